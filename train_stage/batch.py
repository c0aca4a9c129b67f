"""One micro-batch as the model reads it: samples end to end in rows, without padding.

Shapes: B rows (one, in training), L tokens, V views, S pixels an edge, P positions a view, N newlines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

IGNORE = -100
"""Label of a token that the text loss does not score."""

NO_TOKEN = -1
"""`view_position` of a cell that has no token: LLaVA-NeXT leaves it out as padding, or the view is the dummy."""


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch; views stand in the order of their image tokens in `input_ids`.

    input_ids, labels   int64 (B, L); labels are not shifted, `IGNORE` marks what is not supervised, and always the
                        first token of a sample, so that no sample is told what follows the one before it
    position_ids        int64 (B, L); start at 0 with every sample, which keeps samples from seeing each other
    views               uint8 (V, S, S, 3), V >= 1: one dummy view when the micro-batch has no image
    view_position       int64 (V, P); index into the B*L flattened tokens, or `NO_TOKEN`
    target_mask         bool (V, P); True where a cell enters the visual loss (never True where
                        `view_position` is `NO_TOKEN`, on padding cells and on the dummy)
    sample_ids          names of the samples, for error messages
    targets             by the name of a term what its manifests hold: codes int64 (V, P, D), or features (V, Q, W) in
                        their own dtype and on their own grid. Empty in a micro-batch without images
    view_keys           int64 (V,): stands for the view, whichever batch it is in; random draws start from it
    blanks              text-only samples that score as the blank image with hidden states of zero (`reference_parity`)
    blank_codes         by the name of a term int64 (P, D), the codes of that image
    draw_seed           what the random draws of this step start from, beside `view_keys`
    base_view           bool (V,); the views that their images begin with. None: all, each image is one view
    newline_position    int64 (N,); where in the flattened tokens the image tokens stand that are no cells, but the ends
                        of LLaVA-NeXT's rows. None: there are none
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    views: Tensor
    view_position: Tensor
    target_mask: Tensor
    sample_ids: list[str]
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    view_keys: Tensor | None = None
    draw_seed: int = 0
    blanks: int = 0
    blank_codes: Mapping[str, Tensor] = field(default_factory=dict)
    base_view: Tensor | None = None
    newline_position: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`, but for `view_keys`, from which draws are made on the CPU."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        def moved_if_there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else moved(tensor)

        return replace(
            self,
            input_ids=moved(self.input_ids),
            position_ids=moved(self.position_ids),
            labels=moved(self.labels),
            views=moved(self.views),
            view_position=moved(self.view_position),
            target_mask=moved(self.target_mask),
            base_view=moved_if_there(self.base_view),
            newline_position=moved_if_there(self.newline_position),
            targets={name: moved(target) for name, target in self.targets.items()},
            blank_codes={name: moved(codes) for name, codes in self.blank_codes.items()},
        )

    @property
    def has_images(self) -> bool:
        """Whether any view has a token, i.e. the views are not just the dummy."""
        return bool((self.view_position != NO_TOKEN).any())


def dummy_view(size: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """`views`, `view_position` and `target_mask` of a micro-batch without images.

    The dummy keeps every trainable parameter in every forward pass, which the ZeRO stages need: they
    expect the same gradients in the same order from every rank. Nothing of it reaches a loss.
    """
    views = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    position = torch.full((1, positions), NO_TOKEN, dtype=torch.int64)
    return views, position, torch.zeros(1, positions, dtype=torch.bool)


def count_text_targets(batch: Batch) -> int:
    """Number of tokens the text loss scores."""
    return int((batch.labels[:, 1:] != IGNORE).sum())


def count_pairs(batch: Batch) -> int:
    """Sum over the samples of a micro-batch of their tokens squared: what attention takes, as (n+1)^2 - n^2 = 2n + 1."""
    return int((2 * batch.position_ids + 1).sum())


def count_visual_targets(batch: Batch, shift: str) -> int:
    """Number of positions whose codes the visual loss scores; see `objectives.codes.select_targets` for `shift`."""
    mask = batch.target_mask if shift == "none" else not_first(batch.target_mask, batch.base_view)
    return int(mask.sum())


def not_first(mask: Tensor, base_view: Tensor | None) -> Tensor:
    """`mask` (V, P) without the first cell of each image, which no token of the image comes before."""
    first = torch.zeros_like(mask)
    first[:, 0] = True if base_view is None else base_view
    return mask & ~first


def chosen_positions(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Where a term that scores cells one by one looks: what `target_mask` lets through.

    Returns indices (N,) into the flattened (B*L,) tokens, indices (N,) into the flattened (V*P,) cells, and weights
    float32 (N,) of ones. With nothing to score there is one row of weight zero, so that a head still takes part.
    """
    chosen = batch.target_mask.flatten().nonzero().squeeze(1)
    if chosen.numel() == 0:
        nowhere = chosen.new_zeros(1)
        return nowhere, nowhere, torch.zeros(1, device=chosen.device)
    index = batch.view_position.flatten().index_select(0, chosen)
    return index, chosen, torch.ones(chosen.numel(), device=chosen.device)
