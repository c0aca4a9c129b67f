"""Product quantisation: a feature is cut into D chunks, each searched, exactly, in a codebook of its own.

Shape legend: B views, S edge of a view, P positions, n width of a chunk and of a code vector, D depths, K vectors.
"""

from __future__ import annotations

import torch

from manifests.codebook import Codebooks
from manifests.schema import TokenizerSpec
from tokenize_stage.search import ResidualSearch
from tokenize_stage.tokenizers.residual import Encoder


class ProductTokenizer:
    """An encoder of features D n wide, and D codebooks; code d says what chunk d is. See `tokenizers.base.Tokenizer`."""

    def __init__(self, spec: TokenizerSpec, encoder: Encoder, codebooks: Codebooks) -> None:
        self._spec = spec
        self._encoder = encoder
        self._codebooks = codebooks
        self._searches = [ResidualSearch([codebook], encoder.device) for codebook in codebooks]

    @property
    def spec(self) -> TokenizerSpec:
        return self._spec

    @property
    def encoder(self) -> Encoder:
        return self._encoder

    @property
    def fallbacks(self) -> int:
        return sum(search.fallback_rows for search in self._searches)

    def encode(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) -> int32 (B, P, D) on the encoder's device."""
        chunks = self._encoder.features(views_BSSC).flatten(0, 1).split(self._spec.code_dim, dim=1)
        codes = [search(chunk_Nn) for search, chunk_Nn in zip(self._searches, chunks, strict=True)]
        return torch.cat(codes, 1).view(len(views_BSSC), self._spec.positions, self._spec.depth)

    def codebooks(self) -> Codebooks:
        return self._codebooks
