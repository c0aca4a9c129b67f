"""Held-out losses: those of training, with per-depth loss and accuracy, on samples that no step trains on.

Deterministic: every sample once, in an order of its own, without dropout and with the same random draws each time, so that
the values of two steps differ by the model alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from manifests.errors import InputError, TrainingStopped
from manifests.fingerprint import differing_keys
from manifests.reader import open_manifest
from train_stage.batch import Batch, count_text_targets
from train_stage.collate import Collator, is_fill
from train_stage.config import ResolvedPhase, ValidationConfig
from train_stage.loader import collect_steps
from train_stage.loop import draw_seed, is_finite, reduce_sums
from train_stage.losses import LossSums
from train_stage.metrics import ValidationMetrics
from train_stage.model import AsvrModel
from train_stage.packing import Packing
from train_stage.plan import make_plan
from train_stage.ranks import Ranks
from train_stage.samples import Samples
from train_stage.tables import Tables

DRAWS = 0
"""The step that validation's random draws are those of; training has none of that number."""


@dataclass(frozen=True)
class HeldOut:
    """Samples to validate on, and what makes micro-batches of them; `batch_size` samples are in hand at a time."""

    samples: Samples
    collator: Collator
    packing: Packing
    batch_size: int


def validation_phase(phase: ResolvedPhase, validation: ValidationConfig) -> ResolvedPhase:
    """The phase with its held-out data in the place of its own, for whatever reads samples.

    Without `reference_parity`: whatever a phase minimises, it is judged by the same losses as any other.
    """
    return phase.model_copy(
        update={"name": f"{phase.name}/validation", "data": validation.data, "reference_parity": None}
    )


def validation_tables(
    phase: ResolvedPhase, validation: ValidationConfig, tables: Mapping[str, Tables]
) -> dict[str, Tables]:
    """For each group of the phase's manifests, those of the validation that have its fingerprint; else its own.

    InputError for a manifest that belongs to no group: its codes are not those that the phase predicts.
    """
    if not validation.manifests:
        return dict(tables)
    found: dict[str, Tables] = {}
    opened = [open_manifest(path) for path in validation.manifests]
    for manifest in opened:
        if not any(manifest.manifest.fingerprint == own.manifests[0].manifest.fingerprint for own in tables.values()):
            first = next(iter(tables.values()), None)
            differing = (
                differing_keys(first.manifests[0].manifest.fingerprint_keys, manifest.manifest.fingerprint_keys)
                if first
                else ["the phase has no manifests"]
            )
            raise InputError(
                f"the validation of phase {phase.name} names {manifest.folder}, which was made with other settings than "
                f"the manifests of the phase ({'; '.join(differing[:4])}): tokenize the held-out images with the same"
            )
    for name, own in tables.items():
        mine = [one for one in opened if one.manifest.fingerprint == own.manifests[0].manifest.fingerprint]
        same = next((done for done in found.values() if mine and done.manifests == mine), None)
        found[name] = same or (Tables(mine) if mine else own)
    return found


def validate(
    forward: Callable[[Batch], LossSums],
    model: AsvrModel,
    held_out: HeldOut,
    ranks: Ranks,
    *,
    step: int,
    seed: int,
    workers: int,
) -> ValidationMetrics:
    """The losses of `model` on all of `held_out`, over all ranks. Collective; the model's mode is given back.

    `forward` is the model, or the engine that has it. Raises the error of a sample that cannot be made, and
    TrainingStopped, which names the samples, for a loss that is not finite.
    """
    started = time.monotonic()
    was_training = model.training
    model.eval()
    draws = draw_seed(seed, DRAWS)
    sums: list[LossSums] = []
    bad: list[str] = []
    counts = torch.zeros(3 + len(model.terms), dtype=torch.int64)
    plan = make_plan(seed, len(held_out.samples), held_out.batch_size, epochs=1, max_steps=None)
    steps = collect_steps(
        plan, held_out.packing, held_out.collator, first_step=1, rank=ranks.rank, world=ranks.world, workers=workers
    )
    try:
        for collected in steps:
            ranks.share_error(collected.error)
            for made in collected.batches:
                batch = replace(made.to(ranks.device), draw_seed=draws)
                with torch.no_grad():
                    own = forward(batch).detached()
                sums.append(own)
                counts += torch.tensor(_counts(batch, model))
                if not is_finite(own):
                    bad += batch.sample_ids
    finally:
        steps.close()
        model.train(was_training)
    ranks.share_error(_not_finite(step, bad) if bad else None)
    samples, tokens, text_tokens, *targets = map(int, ranks.sum(counts.tolist()))
    by_term = dict(zip(model.terms, targets, strict=True))
    weights = {name: term.weight for name, term in model.terms.items()}
    totals = reduce_sums(ranks, sums, text_tokens, by_term, weights)
    return ValidationMetrics(
        step=step,
        loss=totals.loss,
        text_loss=totals.text_loss,
        visual_loss=totals.visual_loss,
        objectives=totals.terms,
        samples=samples,
        tokens=tokens,
        text_tokens=text_tokens,
        seconds=time.monotonic() - started,
    )


def _not_finite(step: int, samples: list[str]) -> TrainingStopped:
    return TrainingStopped(
        f"at step {step} the validation loss is not finite; the samples are {', '.join(samples[:16])}: look at them, or "
        "lower lr, and start again from the last checkpoint"
    )


def _counts(batch: Batch, model: AsvrModel) -> list[int]:
    real = not is_fill(batch)
    return [
        len(batch.sample_ids) * real,
        batch.input_ids.numel() * real,
        count_text_targets(batch),
        *(term.count_targets(batch) for term in model.terms.values()),
    ]
