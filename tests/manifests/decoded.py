"""What the tests of decoding compare with: sample files, Pillow's pixels, and the reject a file comes to."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from made_pictures import samples
from numpy.typing import NDArray
from PIL import Image

from manifests.decode import Reject, decode

SAMPLES = samples()


def rejected(data: bytes, **options: int) -> Reject:
    with pytest.raises(Reject) as caught:
        decode(data, **options)
    assert "\n" not in caught.value.message
    return caught.value


def pillow(data: bytes) -> NDArray[np.uint8]:
    with Image.open(BytesIO(data)) as image:
        return np.array(image.convert("RGB"))
