"""The one thing read from EXIF: which way up the picture is.

A tolerant reader of its own, because damaged metadata is no damaged picture: whatever cannot be read means "as
stored", without warnings. Source: EXIF 2.32 section 4.6 (tag 0x0112), TIFF 6.0 section 2.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

_PREFIX = b"Exif\0\0"
_ORIENTATION = 0x0112
_AS_STORED = 1


def orientation_of(exif: bytes) -> int:
    """The orientation 1..8 that an EXIF block (with or without its "Exif" prefix) states; 1 for anything else."""
    tiff = exif.removeprefix(_PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return _AS_STORED
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    if first + 2 > len(tiff):
        return _AS_STORED
    (count,) = struct.unpack_from(order + "H", tiff, first)
    for at in range(first + 2, min(first + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, values = struct.unpack_from(order + "HHI", tiff, at)
        if tag == _ORIENTATION:
            if values != 1 or kind not in (3, 4):
                return _AS_STORED
            (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), tiff, at + 8)
            return int(value) if 1 <= value <= 8 else _AS_STORED
    return _AS_STORED


def upright(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation.

    image: uint8 (H, W, 3) as stored; returns a contiguous uint8 (H, W, 3), or (W, H, 3) for orientations 5 to 8.
    Orientation 2 is mirrored left-right, 3 turned by 180 degrees, 4 mirrored top-bottom, 5 transposed,
    6 needs a quarter turn clockwise, 7 transposed across the other diagonal, 8 needs a quarter turn the other way.
    """
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)
