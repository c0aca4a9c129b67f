"""ASVR: the hidden state of an image position predicts the codes of a cell, depth after depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from manifests.errors import InputError
from manifests.schema import TokenizerSpec
from train_stage import objective_config as config
from train_stage.batch import IGNORE, Batch, count_visual_targets, not_first
from train_stage.flops import Forward
from train_stage.losses import CHUNK, TermSums, sum_over_chunks
from train_stage.objectives.base import NOTHING, Objective, Surroundings, Target
from train_stage.visual_head import build_head

POSITIONS = CHUNK // 4
"""Positions that are scored at once. Each is D slots of the depth transformer, of which everything is kept while its chunk is
recomputed: 1.8 MB at the released size, where a token of text keeps its logits alone."""


def build(settings: config.CodesObjective, target: Target, around: Surroundings) -> CodesObjective:
    """The term of a phase; InputError unless the codes have the tower's grid."""
    spec = target.spec
    if not isinstance(spec, TokenizerSpec):
        raise InputError(f"{target.where} holds features, not codes: give objective {settings.name} a set of codes")
    if spec.grid != around.grid:
        raise InputError(
            f"{target.where} has {spec.grid[0]}x{spec.grid[1]} positions a view and the vision tower makes "
            f"{around.grid[0]}x{around.grid[1]}: use a tower with the tokenizer's grid, or tokenize for this one"
        )
    made = CodesObjective(settings, around.hidden_size, target.codebooks, residual=spec.residual)
    made.codebook_sha256 = target.codebook_sha256
    return made


def select_targets(
    view_position: Tensor,
    mask: Tensor,
    codes: Tensor | None,
    depth: int,
    shift: str,
    base_view: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Which hidden states are scored, and against what.

    `shift` is "none" (a cell's codes against the hidden state of its own token, what the published numbers used) or
    "next" (against that of the token right before it, so that an image's first cell is no target). With several views
    an image, `base_view` (V,) tells those that images begin with. The token before the first cell of a view or a row of
    LLaVA-NeXT's joined tiles is whichever the language model reads before it: the last one of the base view, a newline
    or a cell of the tile beside it. A target counts when its cell is in `mask` (V, P).

    Returns indices (N,) into the flattened (B*L,) tokens, targets int64 (N, D) and the count. With nothing to score
    there is one row of `IGNORE`, so that the head still takes part in the pass.
    """
    if shift == "next":
        view_position, mask = view_position - 1, not_first(mask, base_view)
    chosen = mask.flatten().nonzero().squeeze(1)
    if codes is None or chosen.numel() == 0:
        nowhere = view_position.new_zeros(1)
        return nowhere, view_position.new_full((1, depth), IGNORE), 0
    index = view_position.flatten().index_select(0, chosen)
    return index, codes.flatten(0, 1).index_select(0, chosen), chosen.numel()


class CodesObjective(Objective):
    """Cross-entropy of the visual head's logits, summed over positions, per depth."""

    codebook_sha256: str | None = None

    def __init__(
        self,
        settings: config.CodesObjective,
        hidden_size: int,
        codebooks: Sequence[np.ndarray],
        *,
        residual: bool = True,
        chunk: int = POSITIONS,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.weight = settings.weight
        self.chunk = chunk
        self.depth = len(codebooks)
        self.residual = residual
        self.visual_head = build_head(hidden_size, settings.head, codebooks, residual=residual)

    @override
    def forward(self, hidden_BLH: Tensor, batch: Batch, tower: Mapping[int, Tensor] = NOTHING) -> TermSums:
        codes = batch.targets.get(self.settings.name)
        sums = self.score(hidden_BLH, batch.view_position, codes, batch.target_mask, batch.base_view)
        return self._add_blanks(sums, hidden_BLH, batch) if batch.blanks else sums

    def _add_blanks(self, sums: TermSums, hidden_BLH: Tensor, batch: Batch) -> TermSums:
        """`sums` and those of the text-only samples, which are all alike: the blank image's codes at hidden states of zero."""
        codes_PD = batch.blank_codes[self.settings.name][self._unscored :]
        zeros_PH = hidden_BLH.new_zeros(len(codes_PD), hidden_BLH.shape[-1])
        loss_D, correct_D = sum_over_chunks(self._score, self.chunk, zeros_PH, codes_PD)
        times = batch.blanks
        return TermSums(
            sums.loss_sum_D + times * loss_D, sums.targets + times * len(codes_PD), sums.correct_D + times * correct_D
        )

    @property
    def _unscored(self) -> int:
        """Cells at the start of an image that no hidden state of the image comes before."""
        return 0 if self.settings.shift == "none" else 1

    def score(
        self,
        hidden_BLH: Tensor,
        view_position: Tensor,
        codes: Tensor | None,
        mask: Tensor,
        base_view: Tensor | None = None,
    ) -> TermSums:
        """The sums of hidden states (B, L, H) whose image positions (V, P) have codes int64 (V, P, D)."""
        index, codes_ND, count = select_targets(view_position, mask, codes, self.depth, self.settings.shift, base_view)
        hidden_NH = hidden_BLH.flatten(0, 1).index_select(0, index)
        loss_D, correct_D = sum_over_chunks(self._score, self.chunk, hidden_NH, codes_ND)
        return TermSums(loss_D, count, correct_D)

    @override
    def count_targets(self, batch: Batch) -> int:
        blank_codes = batch.blank_codes.get(self.settings.name, ())
        blanks = batch.blanks * len(blank_codes[self._unscored :])
        return count_visual_targets(batch, self.settings.shift) + blanks

    @override
    def flops_per_target(self) -> Forward:
        return self.visual_head.forward_flops()

    @override
    def facts(self) -> dict[str, Any]:
        return {
            **self.settings.model_dump(mode="json", exclude={"manifests"}),
            "residual": self.residual,
            "codebook_sizes": list(self.visual_head.codebook_sizes),
            "codebook_sha256": self.codebook_sha256,
        }

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
