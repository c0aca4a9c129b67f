"""Losses as sums and counts, so that a step can be normalised by the counts of all its micro-batches and ranks.

Logits are made for a chunk of positions at a time and made again in the backward pass, so they are never all alive:
27x27 positions x 8 depths x 16,384 codes would be 382 MB an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from train_stage.batch import IGNORE

CHUNK = 1024
"""Positions whose logits are alive at once."""


class TermSums(NamedTuple):
    """What one micro-batch adds to one term of the visual loss.

    loss_sum_D   float32 (D,): loss summed over `targets` targets, per depth (D = 1 for terms without depths)
    correct_D    int64 (D,): targets whose most likely code is the true one, per depth; (0,) for terms that predict no codes
    """

    loss_sum_D: Tensor
    targets: int
    correct_D: Tensor


class LossSums(NamedTuple):
    """What one micro-batch adds to the losses of a step.

    text_loss_sum   float32 (): cross-entropy summed over `text_tokens` targets
    terms           the sums of every term of the visual loss, by name
    """

    text_loss_sum: Tensor
    text_tokens: int
    terms: dict[str, TermSums]

    def total(self, text_tokens: int, targets: Mapping[str, int], weights: Mapping[str, float]) -> Tensor:
        """The micro-batch's share of the step's loss, given the targets of the whole step over all ranks.

        loss = text_sum / text_tokens + sum over terms(weight * mean over depths(loss_sum / targets))
        (arXiv 2506.09040, Eq. 3, has one term of weight 1). Summed over micro-batches and ranks it is the step's loss.
        """
        loss = self.text_loss_sum / max(text_tokens, 1)
        for name, term in self.terms.items():
            loss = loss + weights[name] * term.loss_sum_D.mean() / max(targets[name], 1)
        return loss

    def as_means(self, text_tokens: int, targets: Mapping[str, int], micro_batches: int) -> LossSums:
        """Sums of which `total` makes this micro-batch's own means, divided by the number of micro-batches of the step.

        What averaging the means of micro-batches comes to, in LLaVA's trainer; samples of a micro-batch with few targets
        count for more.
        """

        def share(own: int, whole: int) -> float:
            return whole / (max(own, 1) * micro_batches)

        terms = {
            name: term._replace(loss_sum_D=term.loss_sum_D * share(term.targets, targets[name]))
            for name, term in self.terms.items()
        }
        return LossSums(self.text_loss_sum * share(self.text_tokens, text_tokens), self.text_tokens, terms)

    def detached(self) -> LossSums:
        """The same numbers without the graph behind them."""
        terms = {name: term._replace(loss_sum_D=term.loss_sum_D.detach()) for name, term in self.terms.items()}
        return LossSums(self.text_loss_sum.detach(), self.text_tokens, terms)


def sum_over_chunks(function: Callable[..., tuple[Tensor, ...]], chunk: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The sum of `function(*parts)` over chunks of `chunk` rows; with several chunks the backward pass recomputes."""
    parts = list(zip(*(tensor.split(chunk) for tensor in tensors), strict=True))
    if len(parts) == 1:
        return function(*parts[0])
    # Nothing in the heads is random, so no generator state has to be kept for the recomputation.
    results = [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return tuple(torch.stack(column).sum(dim=0) for column in zip(*results, strict=True))


def text_targets(labels_BL: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where the text loss looks: indices (N,) into the flattened (B*L,) positions, their targets (N,) and the count.

    Position i predicts token i+1 of its own row; the first token of a sample is no target, see `Batch`. With nothing to score there is one target, `IGNORE`, so that the
    output layer still takes part in the pass.
    """
    shifted = torch.full_like(labels_BL, IGNORE)
    shifted[:, :-1] = labels_BL[:, 1:]
    flat = shifted.flatten()
    index = (flat != IGNORE).nonzero().squeeze(1)
    count = index.numel()
    if count == 0:
        index = index.new_zeros(1)
    return index, flat.index_select(0, index), count


def text_loss(
    hidden_BLH: Tensor, labels_BL: Tensor, output_layer: Callable[[Tensor], Tensor], *, chunk: int = CHUNK
) -> tuple[Tensor, int]:
    """Summed cross-entropy of the supervised tokens, float32 (), and their number.

    Equal to Hugging Face's shifted loss times the count, but logits exist at supervised positions only (in LLaVA-1.5
    about a fifth) and in chunks. Logits have the model's dtype, the cross-entropy is float32.
    """
    index, targets, count = text_targets(labels_BL)
    hidden_NH = hidden_BLH.flatten(0, 1).index_select(0, index)

    def summed(hidden: Tensor, target: Tensor) -> tuple[Tensor]:
        logits = output_layer(hidden).float()
        return (F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum"),)

    (loss,) = sum_over_chunks(summed, chunk, hidden_NH, targets)
    return loss, count
