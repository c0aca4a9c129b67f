"""The training loop: one optimizer step, and the steps of a phase one after the other."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manifests.errors import TrainingStopped
from train_stage.batch import Batch, count_pairs, count_text_targets
from train_stage.collate import is_fill
from train_stage.engine import Engine
from train_stage.loader import Collected
from train_stage.losses import LossSums
from train_stage.metrics import StepMetrics, TermMetrics, peak_memory
from train_stage.objectives import Objective
from train_stage.ranks import Ranks

_NAMED_SAMPLES = 16


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the step: linear warm-up to `peak`, then a cosine down to zero.

    As LLaVA-1.5's, but the first step has the rate peak / warmup_steps where Hugging Face's has zero.
    """

    peak: float
    steps: int
    warmup_ratio: float

    def __call__(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        warmup = math.ceil(self.steps * self.warmup_ratio)
        if step <= warmup:
            return self.peak * step / warmup
        progress = (step - 1 - warmup) / max(self.steps - warmup, 1)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Totals:
    """A step's losses and counts, summed over its micro-batches and over all ranks."""

    text_loss: float
    terms: dict[str, TermMetrics]
    visual_loss: float | None
    loss: float


def train_step(
    engine: Engine,
    collected: Collected,
    terms: Mapping[str, Objective],
    learning_rate: float,
    seed: int,
    epoch: int,
    *,
    average_micro_batches: bool = False,
) -> StepMetrics:
    """One optimizer step over the micro-batches of all ranks. Collective.

    Every loss is a sum divided by the step's targets over all ranks, so how the samples are spread over micro-batches
    and ranks changes nothing. Raises TrainingStopped, before anything is updated, if a loss or the gradient is not
    finite; and the error of a rank that could not make its micro-batches. `average_micro_batches`: each loss is the
    mean over micro-batches of their own means instead, see `reference_parity`.
    """
    started = time.monotonic()
    ranks, step = engine.ranks, collected.step
    batches = [replace(batch.to(ranks.device), draw_seed=draw_seed(seed, step)) for batch in collected.batches]

    real = [batch for batch in batches if not is_fill(batch)]
    failed, text_tokens, samples, tokens, pairs, views, slots, micro_batches, *counts = map(
        int,
        ranks.sum(
            [
                collected.error is not None,
                sum(count_text_targets(batch) for batch in batches),
                sum(len(batch.sample_ids) for batch in real),
                sum(batch.input_ids.numel() for batch in real),
                sum(count_pairs(batch) for batch in real),
                sum(len(batch.views) for batch in real if batch.has_images),
                sum(batch.input_ids.numel() for batch in batches),
                len(real),
                *(sum(term.count_targets(batch) for batch in batches) for term in terms.values()),
            ]
        ),
    )
    targets = dict(zip(terms, counts, strict=True))
    weights = {name: term.weight for name, term in terms.items()}
    if failed:
        ranks.share_error(collected.error)

    sums: list[LossSums] = []
    for index, batch in enumerate(batches):
        seed_dropout(seed, step, index * ranks.world + ranks.rank)
        own = engine(batch)
        if average_micro_batches:
            own = own.as_means(text_tokens, targets, micro_batches)
        engine.backward(own.total(text_tokens, targets, weights))
        sums.append(own.detached())

    totals = reduce_sums(ranks, sums, text_tokens, targets, weights)
    if not math.isfinite(totals.loss):
        bad = [batch for batch, own in zip(batches, sums, strict=True) if not is_finite(own)]
        raise_not_finite(engine, step, f"the loss is {totals.loss}", bad)
    grad_norm = engine.step(learning_rate)
    if not math.isfinite(grad_norm):
        raise_not_finite(engine, step, "the gradient is not finite", batches)

    seconds = time.monotonic() - started + collected.wait_seconds
    return StepMetrics(
        step=step,
        epoch=epoch,
        loss=totals.loss,
        text_loss=totals.text_loss,
        visual_loss=totals.visual_loss,
        objectives=totals.terms,
        grad_norm=grad_norm,
        lr=learning_rate,
        samples=samples,
        tokens=tokens,
        text_tokens=text_tokens,
        pairs=pairs,
        views=views,
        padding=1 - tokens / slots,
        memory=int(ranks.most(peak_memory(ranks.device))),
        seconds=seconds,
        data_wait=collected.wait_seconds / seconds,
    )


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Start the random numbers of a micro-batch anew, so that they do not depend on history."""
    hashed = hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(hashed[:8], "little"))


def draw_seed(seed: int, step: int) -> int:
    """What the random draws of a step start from; each view adds its own key."""
    return int.from_bytes(hashlib.sha256(f"draw {seed} {step}".encode()).digest()[:8], "little")


def reduce_sums(
    ranks: Ranks, sums: list[LossSums], text_tokens: int, targets: Mapping[str, int], weights: Mapping[str, float]
) -> Totals:
    """The losses from the sums of this rank's micro-batches; adds up in float64. Collective."""
    per_batch: list[Tensor] = [
        torch.cat(
            [
                own.text_loss_sum.double()[None],
                *(part.double() for term in own.terms.values() for part in (term.loss_sum_D, term.correct_D)),
            ]
        )
        for own in sums
    ]
    text, *rest = ranks.sum(torch.stack(per_batch).sum(dim=0).tolist())
    values = iter(rest)
    terms: dict[str, TermMetrics] = {}
    for name, term in sums[0].terms.items():
        count = max(targets[name], 1)
        losses = [next(values) / count for _ in range(term.loss_sum_D.numel())]
        accuracies = [next(values) / count for _ in range(term.correct_D.numel())]
        terms[name] = TermMetrics(sum(losses) / len(losses), losses, accuracies, targets[name])
    text_loss = text / max(text_tokens, 1)
    visual_loss = sum(weights[name] * term.loss for name, term in terms.items()) if terms else None
    return Totals(text_loss, terms, visual_loss, text_loss + (visual_loss or 0.0))


def is_finite(sums: LossSums) -> bool:
    """Whether a micro-batch's losses are all finite."""
    return bool(torch.isfinite(sums.text_loss_sum)) and all(
        bool(torch.isfinite(term.loss_sum_D).all()) for term in sums.terms.values()
    )


def raise_not_finite(engine: Engine, step: int, what: str, batches: list[Batch]) -> None:
    """Stop all ranks with one sentence that names the samples of the micro-batches concerned. Collective."""
    names = engine.ranks.gather([name for batch in batches for name in batch.sample_ids])
    shown = ", ".join(names[:_NAMED_SAMPLES]) + (
        f" and {len(names) - _NAMED_SAMPLES} more" * (len(names) > _NAMED_SAMPLES)
    )
    engine.ranks.share_error(
        TrainingStopped(
            f"at step {step} {what} and nothing was updated; the samples are {shown}: look at them, or lower lr, "
            "and start again from the last checkpoint"
        )
    )
