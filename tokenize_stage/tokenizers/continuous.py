"""What every producer of features comes to: an encoder whose output is stored instead of quantised.

Shape legend: B views, S edge of a view, P positions, n width of a feature.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from manifests.errors import InputError
from manifests.schema import FeaturesSpec
from tokenize_stage.tokenizers.residual import Encoder

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ContinuousTokenizer:
    """An encoder without a codebook. See `tokenizers.base.Tokenizer`."""

    def __init__(self, spec: FeaturesSpec, encoder: Encoder) -> None:
        self._spec = spec
        self._encoder = encoder

    @property
    def spec(self) -> FeaturesSpec:
        return self._spec

    @property
    def encoder(self) -> Encoder:
        return self._encoder

    @property
    def fallbacks(self) -> int:
        """None: nothing is searched."""
        return 0

    def encode(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) -> (B, P, n) of `spec.dtype` on the encoder's device; `InputError` if not all finite."""
        spec = self._spec
        features_BPn = self._encoder.features(views_BSSC).to(_DTYPES[spec.dtype]).contiguous()
        if features_BPn.shape[1:] != (spec.positions, spec.width):
            raise InputError(
                f"the encoder {spec.origin} makes features of shape {tuple(features_BPn.shape[1:])}, not "
                f"{(spec.positions, spec.width)}: start the job again"
            )
        if not bool(torch.isfinite(features_BPn).all()):
            raise InputError(
                f"the encoder {spec.origin} makes features that are NaN or infinite: check its weights, or let it "
                "compute in float32"
            )
        return features_BPn

    def codebooks(self) -> list[npt.NDArray[np.float32]]:
        """None at all."""
        return []
