"""ASVR: the hidden state of an image position predicts the codes of a cell, depth after depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train_stage import config
from train_stage.batch import IGNORE, Batch, count_visual_targets
from train_stage.losses import CHUNK, sum_over_chunks
from train_stage.objectives.base import Objective
from train_stage.visual_head import VisualHead


def select_targets(batch: Batch, depth: int, shift: str) -> tuple[Tensor, Tensor, int]:
    """Which hidden states are scored, and against what.

    `shift` is "none" (hidden state of cell i against the codes of cell i, what the published numbers used) or "next"
    (cell i against cell i+1 of the same view, so P-1 targets a view). A target counts when its own cell is in
    `codes_mask`; the cell that predicts it comes earlier in the same view, so it has a token.

    Returns indices (N,) into the flattened (B*L,) tokens, targets int64 (N, D) and the count. With nothing to score
    there is one row of `IGNORE`, so that the head still takes part in the pass.
    """
    position, mask = batch.view_position, batch.codes_mask
    if shift == "next":
        position, mask = position[:, :-1], mask[:, 1:]
    chosen = mask.flatten().nonzero().squeeze(1)
    if batch.codes is None or chosen.numel() == 0:
        nowhere = position.new_zeros(1)
        return nowhere, position.new_full((1, depth), IGNORE), 0
    codes = batch.codes if shift == "none" else batch.codes[:, 1:]
    index = position.flatten().index_select(0, chosen)
    return index, codes.flatten(0, 1).index_select(0, chosen), chosen.numel()


class CodesObjective(Objective):
    """Cross-entropy of the visual head's logits, summed over positions, per depth."""

    visual_head: VisualHead

    def __init__(
        self,
        objective: config.CodesObjective,
        hidden_size: int,
        codebooks: Sequence[np.ndarray],
        *,
        residual: bool = True,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        self.settings = objective
        self.shift = objective.shift
        self.weight = objective.weight
        self.chunk = chunk
        self.visual_head = VisualHead(hidden_size, objective.head, codebooks, residual=residual)

    def forward(self, hidden_BLH: Tensor, batch: Batch) -> tuple[Tensor, int, Tensor]:
        index, codes_ND, count = select_targets(batch, self.visual_head.depth, self.shift)
        hidden_NH = hidden_BLH.flatten(0, 1).index_select(0, index)
        loss_D, correct_D = sum_over_chunks(self._score, self.chunk, hidden_NH, codes_ND)
        return loss_D, count, correct_D

    def count_targets(self, batch: Batch) -> int:
        return count_visual_targets(batch, self.shift)

    def _score(self, hidden_NH: Tensor, codes_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Summed float32 cross-entropy (D,) and correct predictions int64 (D,) of one chunk."""
        # IGNORE marks the row that stands for "no targets"; as context any code will do.
        logits = self.visual_head(hidden_NH, codes_ND.clamp(min=0))
        losses, correct = [], []
        for d, logits_NK in enumerate(logits):
            target = codes_ND[:, d]
            losses.append(F.cross_entropy(logits_NK.float(), target, ignore_index=IGNORE, reduction="sum"))
            correct.append((logits_NK.detach().argmax(dim=-1) == target).sum())
        return torch.stack(losses), torch.stack(correct)
