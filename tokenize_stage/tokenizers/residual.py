"""The tokenizer that most families come to: features of an encoder, searched residually, exactly.

Shape legend: B views, S edge of a view, P positions, n width of a feature, D depths, K vectors of a codebook.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from manifests.schema import TokenizerSpec
from tokenize_stage.search import ResidualSearch


class Encoder(Protocol):
    """What gives the features that are quantised."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def features(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) on any device -> float32 (B, P, n) on `device`, P row-major over the grid."""
        ...


class ResidualTokenizer:
    """An encoder and D codebooks in one space. See `tokenizers.base.Tokenizer`."""

    def __init__(self, spec: TokenizerSpec, encoder: Encoder, codebooks: list[npt.NDArray[np.float32]]) -> None:
        self._spec = spec
        self._encoder = encoder
        self._codebooks = codebooks
        self._search = ResidualSearch(codebooks, encoder.device)

    @property
    def spec(self) -> TokenizerSpec:
        return self._spec

    @property
    def encoder(self) -> Encoder:
        """What gives the features."""
        return self._encoder

    @property
    def fallbacks(self) -> int:
        return self._search.fallback_rows

    def encode(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) -> int32 (B, P, D) on the encoder's device."""
        features_BPn = self._encoder.features(views_BSSC)
        codes_ND = self._search(features_BPn.flatten(0, 1))
        return codes_ND.view(len(views_BSSC), self._spec.positions, self._spec.depth)

    def codebooks(self) -> list[npt.NDArray[np.float32]]:
        return self._codebooks
