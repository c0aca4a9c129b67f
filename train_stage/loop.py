"""The training loop: one optimizer step, and the steps of a phase one after the other."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manifests.errors import TrainingStopped
from train_stage.batch import Batch, count_text_targets
from train_stage.collate import is_fill
from train_stage.engine import Engine
from train_stage.loader import Collected
from train_stage.losses import LossSums
from train_stage.metrics import StepMetrics

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
    visual_loss_depth: list[float]
    visual_accuracy_depth: list[float]
    visual_loss: float | None
    loss: float


def train_step(
    engine: Engine,
    collected: Collected,
    count_visual_targets: Callable[[Batch], int],
    visual_weight: float,
    learning_rate: float,
    seed: int,
    epoch: int,
) -> StepMetrics:
    """One optimizer step over the micro-batches of all ranks. Collective.

    Every loss is a sum divided by the step's targets over all ranks, so how the samples are spread over micro-batches
    and ranks changes nothing. Raises TrainingStopped, before anything is updated, if a loss or the gradient is not
    finite; and the error of a rank that could not make its micro-batches.
    """
    started = time.monotonic()
    ranks, step = engine.ranks, collected.step
    batches = [batch.to(ranks.device) for batch in collected.batches]

    failed, text_tokens, visual_positions, samples, tokens = map(
        int,
        ranks.sum(
            [
                collected.error is not None,
                sum(count_text_targets(batch) for batch in batches),
                sum(count_visual_targets(batch) for batch in batches),
                sum(len(batch.sample_ids) for batch in batches if not is_fill(batch)),
                sum(int(batch.attention_mask.sum()) for batch in batches if not is_fill(batch)),
            ]
        ),
    )
    if failed:
        ranks.share_error(collected.error)

    sums: list[LossSums] = []
    for index, batch in enumerate(batches):
        seed_dropout(seed, step, index * ranks.world + ranks.rank)
        own = engine(batch)
        engine.backward(own.total(text_tokens, visual_positions, visual_weight))
        sums.append(detached(own))

    totals = reduce_sums(engine, sums, text_tokens, visual_positions, visual_weight)
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
        visual_loss_depth=totals.visual_loss_depth,
        visual_accuracy_depth=totals.visual_accuracy_depth,
        grad_norm=grad_norm,
        lr=learning_rate,
        samples=samples,
        tokens=tokens,
        text_tokens=text_tokens,
        visual_positions=visual_positions,
        seconds=seconds,
        data_wait=collected.wait_seconds / seconds,
    )


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Start the random numbers of a micro-batch anew, so that they depend on neither rank nor history."""
    hashed = hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(hashed[:8], "little"))


def detached(sums: LossSums) -> LossSums:
    """The same numbers without the graph behind them."""
    return sums._replace(text_loss_sum=sums.text_loss_sum.detach(), visual_loss_sum_D=sums.visual_loss_sum_D.detach())


def reduce_sums(
    engine: Engine, sums: list[LossSums], text_tokens: int, visual_positions: int, visual_weight: float
) -> Totals:
    """A step's losses from the sums of this rank's micro-batches; adds up in float64. Collective."""
    per_batch: list[Tensor] = [
        torch.cat([own.text_loss_sum.double()[None], own.visual_loss_sum_D.double(), own.visual_correct_D.double()])
        for own in sums
    ]
    text, *visual = engine.ranks.sum(torch.stack(per_batch).sum(dim=0).tolist())
    depth = len(visual) // 2
    positions = max(visual_positions, 1)
    losses = [value / positions for value in visual[:depth]]
    text_loss = text / max(text_tokens, 1)
    visual_loss = sum(losses) / depth if depth else None
    return Totals(
        text_loss=text_loss,
        visual_loss_depth=losses,
        visual_accuracy_depth=[value / positions for value in visual[depth:]],
        visual_loss=visual_loss,
        loss=text_loss + visual_weight * (visual_loss or 0.0),
    )


def is_finite(sums: LossSums) -> bool:
    """Whether a micro-batch's losses are all finite."""
    return bool(torch.isfinite(sums.text_loss_sum)) and bool(torch.isfinite(sums.visual_loss_sum_D).all())


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
