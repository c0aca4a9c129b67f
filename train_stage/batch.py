"""One micro-batch as the model reads it.

Shapes: B samples, L tokens, V views, S pixels an edge, P positions a view, D depths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE = -100
"""Label of a token that the text loss does not score."""

NO_TOKEN = -1
"""`view_position` of a cell that has no token: the view was truncated away, or is the dummy."""


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch; views stand in the order of their image tokens in `input_ids`.

    input_ids, labels   int64 (B, L); labels are not shifted, `IGNORE` marks what is not supervised
    attention_mask      int64 (B, L); 1 on tokens, 0 on padding (right-hand side)
    views               uint8 (V, S, S, 3), V >= 1: one dummy view when the micro-batch has no image
    view_position       int64 (V, P); index into the B*L flattened tokens, or `NO_TOKEN`
    codes               int64 (V, P, D), or None when the phase names no manifests
    codes_mask          bool (V, P); True where a cell enters the visual loss (never True where
                        `view_position` is `NO_TOKEN`, on padding cells and on the dummy)
    sample_ids          names of the samples, for error messages
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    views: Tensor
    view_position: Tensor
    codes: Tensor | None
    codes_mask: Tensor
    sample_ids: list[str]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            views=self.views.to(device, non_blocking=True),
            view_position=self.view_position.to(device, non_blocking=True),
            codes=None if self.codes is None else self.codes.to(device, non_blocking=True),
            codes_mask=self.codes_mask.to(device, non_blocking=True),
        )

    @property
    def has_images(self) -> bool:
        """Whether any view has a token, i.e. the views are not just the dummy."""
        return bool((self.view_position != NO_TOKEN).any())


def dummy_view(size: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """`views`, `view_position` and `codes_mask` of a micro-batch without images.

    The dummy keeps every trainable parameter in every forward pass, which the ZeRO stages need: they
    expect the same gradients in the same order from every rank. Nothing of it reaches a loss.
    """
    views = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    position = torch.full((1, positions), NO_TOKEN, dtype=torch.int64)
    return views, position, torch.zeros(1, positions, dtype=torch.bool)


def count_text_targets(batch: Batch) -> int:
    """Number of tokens the text loss scores: position i predicts token i+1, so column 0 is no target."""
    return int((batch.labels[:, 1:] != IGNORE).sum())


def count_visual_targets(batch: Batch, shift: str) -> int:
    """Number of positions whose codes the visual loss scores; see `objectives.codes.select_targets` for `shift`."""
    mask = batch.codes_mask if shift == "none" else batch.codes_mask[:, 1:]
    return int(mask.sum())
