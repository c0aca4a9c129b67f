"""The protocol of an objective: one term of the loss at image positions.

Shapes: B samples, L tokens, H width of the language model, V views, P positions of a view, C width of the tower, D what
a term counts apart (the depths of codes; 1 for the others).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, nn

from manifests.schema import Producer
from train_stage.batch import Batch
from train_stage.flops import Forward
from train_stage.losses import TermSums

NOTHING: Mapping[int, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Target:
    """What the manifests of a term say of its targets; `codebooks` are D float32 arrays (K_d, C), empty for features."""

    spec: Producer
    codebooks: Sequence[np.ndarray] = ()
    codebook_sha256: str | None = None
    where: str = "the manifest"


@dataclass(frozen=True)
class Surroundings:
    """What a term is built into: widths of the language model and the tower, and the (rows, columns) of a view."""

    hidden_size: int
    tower_width: int
    grid: tuple[int, int]


class Objective(nn.Module, ABC):
    """Turns hidden states at image positions into one term of the loss.

    Its parameters are training aids, the part `visual_head` of a phase; they are not exported with the LLaVA model.
    A module `train_stage.objectives.KIND` has a function `build(settings, target, around) -> Objective`.
    """

    # No defaults here: a class attribute would hide a registered module of the same name.
    weight: float

    language_layer: int | None = None
    """Which hidden_states of the language model it looks at; None: the last, after the final norm."""
    tower_layer: int | None = None
    """Which hidden_states of the tower it looks at, if any."""

    @abstractmethod
    def forward(self, hidden_BLH: Tensor, batch: Batch, tower: Mapping[int, Tensor] = NOTHING) -> TermSums:
        """The term's sums over the targets of a micro-batch.

        `hidden_BLH` are the language model's hidden states of `language_layer`, an argument of its own because ZeRO-3
        finds the end of a term's backward pass by its gradient. `tower` has the frozen tower's hidden_states (V, P, C)
        without class token, by the layers that terms ask for.

        Every parameter takes part in every call, whatever the batch holds, with gradient zero where nothing is scored.
        """

    @abstractmethod
    def count_targets(self, batch: Batch) -> int:
        """The number of targets `forward` would score."""

    @abstractmethod
    def flops_per_target(self) -> Forward:
        """FLOPs of the forward pass for one target, by the convention of `train_stage.flops`."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a reader of its exported weights needs to know, as JSON."""
