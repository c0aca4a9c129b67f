"""The protocol every visual tokenizer of this stage fulfils. Imports no torch at run time.

Shape legend: B views, S edge of a view, P positions of a view, D depths, K vectors of a codebook, n width of a feature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from manifests.schema import Producer

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tokenize_stage.tokenizers.residual import Encoder


class Tokenizer(Protocol):
    """A frozen tokenizer on one device: uint8 views in, codes (or, where its spec is of features, features) out."""

    @property
    def spec(self) -> Producer:
        """What it is, and the shape of what it makes."""
        ...

    @property
    def fallbacks(self) -> int:
        """Residual rows, summed over depths, that the fast search handed to the slow exact one so far."""
        ...

    @property
    def encoder(self) -> Encoder:
        """What gives the features that are quantised, or stored."""
        ...

    def encode(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) on any device -> int32 (B, P, D) codes on the tokenizer's device, or (B, P, n) features
        of `spec.dtype`.

        Positions are row-major over the grid. Call it with one fixed B: the codes of a view are only
        promised to be the same in a batch of the same shape. Raises `InputError` if the encoder
        produces NaN or infinity.
        """
        ...

    def codebooks(self) -> list[np.ndarray]:
        """D float32 arrays (K, code_dim): the vectors that code k of depth d stands for; none of features."""
        ...
