"""LLaVA-1.5: nothing is asked of the image positions."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from train_stage.batch import Batch
from train_stage.objectives.base import Objective


class NoneObjective(Objective):
    """Text loss alone: no parameters, no depths, no targets."""

    def __init__(self) -> None:
        super().__init__()
        self.visual_head = None
        self.weight = 0.0

    @override
    def forward(self, hidden_BLH: Tensor, batch: Batch) -> tuple[Tensor, int, Tensor]:
        nothing = hidden_BLH.new_zeros(0, dtype=torch.float32)
        return nothing, 0, nothing.long()

    @override
    def count_targets(self, batch: Batch) -> int:
        return 0
