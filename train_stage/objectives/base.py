"""The protocol of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from train_stage.batch import Batch


class Objective(nn.Module, ABC):
    """Turns hidden states at image positions into a loss. Its parameters are training aids and are not exported with
    the LLaVA model.

    `visual_head` is the part that a phase may train, None if the objective has none; `weight` is that of its loss.
    """

    # No defaults here: a class attribute would hide the registered module of the same name.
    visual_head: nn.Module | None
    weight: float

    @abstractmethod
    def forward(self, hidden_BLH: Tensor, batch: Batch) -> tuple[Tensor, int, Tensor]:
        """Loss summed over targets float32 (D,), number of targets, correct predictions int64 (D,).

        Every parameter takes part in every call, whatever the batch holds, with gradient zero where nothing is scored.
        """

    @abstractmethod
    def count_targets(self, batch: Batch) -> int:
        """The number of targets `forward` would score."""
