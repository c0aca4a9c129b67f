"""`asvr train --check`: everything that can be known of a run before it starts, from files and shapes.

All that is wrong or missing is collected, not only the first of it. No weights are read, and no process is started.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from manifests.errors import AsvrError
from manifests.reader import open_manifest
from manifests.records import BadRecord, read_records
from manifests.schema import Geometry
from manifests.storage import Store
from train_stage.chat import BadSample, ChatEncoder
from train_stage.checkpoint import check_fits, newest, settings_of, start_of
from train_stage.config import INPUT_CODES, VISION_FEATURES, ResolvedPhase, TrainConfig
from train_stage.cost import Part, count_parts, flop_model, kept
from train_stage.deepspeed_settings import is_offloaded, stage_of
from train_stage.flops import Work
from train_stage.image_tokens import ImageTokens
from train_stage.memory import Memory, activations, checkpoint_bytes, estimate, head_bytes
from train_stage.model import AsvrModel
from train_stage.objectives.codes import POSITIONS, CodesObjective
from train_stage.phase_data import phase_geometry
from train_stage.plan import make_plan
from train_stage.prepare import target_of
from train_stage.samples import truncate
from train_stage.shapes import meta_model
from train_stage.stored_features import check_spec
from train_stage.tables import Tables
from train_stage.tokenizer import load_tokenizer
from train_stage.tower import read_pixel_norm, tower_grid
from train_stage.validation import validation_phase, validation_tables

LOOKED_AT = 256
"""Records of each file whose length is measured; the others are only counted."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Fleet:
    """The GPUs that the hours are for: how many, dense bfloat16 FLOP/s of one, and the share that is put to use."""

    gpus: int
    peak: float
    mfu: float


@dataclass(frozen=True)
class PhaseReport:
    """What a phase takes. flops are those of all its steps; tokens those of an average sample."""

    name: str
    parts: list[Part]
    samples: int
    steps: int
    tokens: float
    flops: float
    hours: float
    memory: Memory
    checkpoint: float


@dataclass
class Report:
    """`problems` in the order they were found; phases that some of them keep from being estimated are left out.

    notes are what a run can start with all the same.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    phases: list[PhaseReport] = field(default_factory=list)

    def attempt(self, function: Callable[[], Value]) -> Value | None:
        """What a function returns; None after noting what it complains of."""
        try:
            return function()
        except AsvrError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def note(self, problem: str) -> None:
        """A problem, once."""
        if problem not in self.problems:
            self.problems.append(problem)


@dataclass(frozen=True)
class Lengths:
    """Records of a phase's data after the ratios, and of those looked at: tokens, supervised tokens and images each."""

    records: float
    tokens: list[int]
    supervised: list[int]
    images: list[int]


def check(config: TrainConfig, fleet: Fleet) -> Report:
    """Look at every phase of a run."""
    report = Report()
    tokenizer = report.attempt(lambda: load_tokenizer(config.model))
    encoder = None if tokenizer is None else ChatEncoder(tokenizer, config.model.image_token)
    if config.init_from is not None:
        report.attempt(lambda: start_of(config))
    _check_evaluation(config, report)
    carried = 0
    for each in config.phases:
        phase = config.phase(each.name)
        report.attempt(lambda phase=phase: _check_checkpoint(config, phase))  # type: ignore[misc]
        found = _check_phase(config, phase, encoder, fleet, report, carried)
        if found is not None:
            report.phases.append(found)
            carried = max(carried, kept(found.parts))
    return report


def _check_phase(
    config: TrainConfig, phase: ResolvedPhase, encoder: ChatEncoder | None, fleet: Fleet, report: Report, carried: int
) -> PhaseReport | None:
    tables = {name: report.attempt(lambda p=paths: _open(p)) for name, paths in phase.all_manifests.items()}  # type: ignore[misc]
    there = _check_paths(phase, report)
    validated = phase.validation is None or _check_paths(validation_phase(phase, phase.validation), report)
    opened = {name: own for name, own in tables.items() if own is not None}
    if len(opened) < len(tables):
        return None
    geometry = report.attempt(lambda: phase_geometry(phase, opened))
    if geometry is None:
        return None
    if phase.validation is not None:
        report.attempt(lambda: _check_validation_manifests(phase, opened))
    predicted = [name for name in (*(term.name for term in phase.terms), INPUT_CODES) if name in opened]
    # Reads the codebooks, and with them compares their hash.
    targets = report.attempt(lambda: {name: target_of(opened[name]) for name in predicted})
    model = None if targets is None else report.attempt(lambda: meta_model(config.model, phase, targets, geometry))
    if model is None:
        return None
    grid = tower_grid(model.vision_tower.config, geometry.size)
    if VISION_FEATURES in opened:
        report.attempt(lambda: _check_features(config, model, grid, opened[VISION_FEATURES]))
    if encoder is not None and phase.validation is not None and validated:
        held_out = validation_phase(phase, phase.validation)
        report.attempt(lambda: _measure(held_out, encoder, ImageTokens(geometry, grid), report))
    if encoder is None or not there:
        return None
    lengths = report.attempt(lambda: _measure(phase, encoder, ImageTokens(geometry, grid), report))
    _check_limits(phase, model, grid, report)
    if lengths is None or not lengths.tokens:
        return None
    views = max((_views_of_an_image(own) for own in opened.values()), default=1.0)
    return _estimate(config, phase, model, geometry, lengths, views, fleet, carried)


def _open(paths: tuple[str, ...]) -> Tables:
    tables = Tables([open_manifest(path) for path in paths])
    for manifest in tables.manifests:
        manifest.check_index()
    return tables


def _check_validation_manifests(phase: ResolvedPhase, opened: dict[str, Tables]) -> None:
    if phase.validation is not None:
        for tables in validation_tables(phase, phase.validation, opened).values():
            for manifest in tables.manifests:
                manifest.check_index()


def _check_features(config: TrainConfig, model: AsvrModel, grid: tuple[int, int], stored: Tables) -> None:
    model.pixel_norm = read_pixel_norm(config.model.vision_tower)
    check_spec(stored.spec, model, grid, stored.where)


def _check_checkpoint(config: TrainConfig, phase: ResolvedPhase) -> None:
    last = newest(config.phase_folder(phase.name))
    if last is not None:
        check_fits(last, settings_of(config, phase.name))


def _check_paths(phase: ResolvedPhase, report: Report) -> bool:
    """Note the files and folders of the phase's data that are not there; whether all files of records are."""
    there = True
    for data in phase.data:
        if not Path(data.path).is_file():
            report.note(f"phase {phase.name}: there is no data file {data.path}")
            there = False
        store = report.attempt(lambda root=data.image_root: Store.open(root))  # type: ignore[misc]
        if store is not None and store.is_local and not Path(store.location).is_dir():
            report.note(f"phase {phase.name}: there is no image root {data.image_root}")
    return there


def _check_evaluation(config: TrainConfig, report: Report) -> None:
    """Note what `asvr eval`, and `asvr run` at its end, will look for; the run starts without it."""
    own = config.eval
    for data in own.data if own else ():
        if not Path(data.path).is_file():
            report.notes.append(f"eval: there is no data file {data.path}")
    for path in own.manifests if own else ():
        try:
            open_manifest(path)
        except AsvrError as error:
            report.notes.append(f"eval: {error}")


def _check_limits(phase: ResolvedPhase, model: AsvrModel, grid: tuple[int, int], report: Report) -> None:
    most = getattr(model.llava.config.text_config, "max_position_embeddings", None)
    if most is not None and phase.max_length > most:
        report.notes.append(
            f"phase {phase.name}: max_length {phase.max_length} is more than the {most} positions that the language model "
            "was made for"
        )
    if grid[0] * grid[1] >= phase.max_length:
        report.note(
            f"phase {phase.name}: an image takes {grid[0] * grid[1]} tokens, which leaves no room in max_length "
            f"{phase.max_length}"
        )


def _measure(phase: ResolvedPhase, encoder: ChatEncoder, image_tokens: ImageTokens, report: Report) -> Lengths:
    """Count the records and measure the first of each file, an image taken for one of a view's shape.

    What cannot be used of them is a problem where it is more than the phase's max_bad_rate allows, else a note.
    """
    per_image = _tokens_of_an_image(image_tokens)
    total, looked_at, bad = 0.0, 0, list[str]()
    tokens, supervised, images = [], [], []
    for data in phase.data:
        records = iter(read_records(data.path))
        first = list(islice(records, LOOKED_AT))
        total += (len(first) + sum(1 for _ in records)) * data.ratio
        looked_at += len(first)
        pieces, kept = [], []
        for record in first:
            try:
                if isinstance(record, BadRecord):
                    raise BadSample("record", record.message)
                pieces.append(encoder.pieces(phase.template, record.conversations, len(record.images)))
                kept.append(len(record.images))
            except BadSample as reason:
                bad.append(f"a record of {data.path} does not fit template {phase.template}: {reason}")
        for encoded, count in zip(encoder.encode(pieces), kept, strict=True):
            try:
                whole, length = truncate(encoded, encoder.image_token_id, np.full(count, per_image), phase.max_length)
            except BadSample as reason:
                bad.append(f"a record of {data.path} cannot be used: {reason}")
                continue
            tokens.append(length)
            supervised.append(int(whole.supervised[1:].sum()))
            images.append(count)
    if bad:
        share = (
            f"phase {phase.name}: {len(bad)} of the first {looked_at} records, max_bad_rate is {phase.max_bad_rate:g}"
        )
        stops = len(bad) > phase.max_bad_rate * looked_at
        (report.note if stops else report.notes.append)(f"{share}; {bad[0]}")
    return Lengths(total, tokens, supervised, images)


def _views_of_an_image(tables: Tables) -> float:
    views = sum(own.manifest.totals.views for own in tables.manifests)
    return views / max(sum(own.manifest.totals.ok for own in tables.manifests), 1)


def _tokens_of_an_image(image_tokens: ImageTokens) -> int:
    size = image_tokens.geometry.size
    return int(image_tokens.count(size, size))


def _estimate(
    config: TrainConfig,
    phase: ResolvedPhase,
    model: AsvrModel,
    geometry: Geometry,
    lengths: Lengths,
    views_of_an_image: float,
    fleet: Fleet,
    carried: int,
) -> PhaseReport:
    parts = count_parts(model)
    trained, total = sum(part.trained for part in parts), sum(part.parameters for part in parts)
    samples = math.ceil(lengths.records)
    plan = make_plan(config.seed, samples, phase.batch_size, phase.epochs, phase.max_steps)
    seen = min(plan.steps * phase.batch_size, samples * phase.epochs)
    share = seen / len(lengths.tokens)
    positions = math.prod(tower_grid(model.vision_tower.config, geometry.size))
    views = sum(lengths.images) * views_of_an_image
    work = Work(
        tokens=round(sum(lengths.tokens) * share),
        pairs=round(sum(length**2 for length in lengths.tokens) * share),
        text_tokens=round(sum(lengths.supervised) * share),
        views=round(views * share),
        targets={name: round(views * positions * share) for name in model.terms},
    )
    flops = flop_model(model, geometry.size)(work)
    bytes_each = 2 if config.precision == "bfloat16" else 4
    text = model.llava.config.text_config
    chunk = min(POSITIONS, phase.micro_batch_tokens)
    scored = [head_bytes(term.visual_head, text.hidden_size, chunk, bytes_each) for term in _of_codes(model)]
    memory = estimate(
        total,
        trained,
        bytes_each=bytes_each,
        stage=stage_of(config.deepspeed),
        offload=is_offloaded(config.deepspeed, "offload_optimizer"),
        offload_weights=is_offloaded(config.deepspeed, "offload_param"),
        gpus=fleet.gpus,
        activations=activations(
            text,
            phase.micro_batch_tokens,
            max(scored, default=0.0),
            bytes_each=bytes_each,
            recompute=config.recompute_activations,
        ),
    )
    return PhaseReport(
        name=phase.name,
        parts=parts,
        samples=samples,
        steps=plan.steps,
        tokens=float(np.mean(lengths.tokens)),
        flops=flops,
        hours=flops / (fleet.gpus * fleet.peak * fleet.mfu) / 3600,
        memory=memory,
        checkpoint=checkpoint_bytes(trained, max(kept(parts), carried), bytes_each),
    )


def _of_codes(model: AsvrModel) -> list[CodesObjective]:
    return [term for term in model.terms.values() if isinstance(term, CodesObjective)]
