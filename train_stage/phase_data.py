"""The data of a run's phases, made before its processes join: reading and tokenizing a large set takes longer than ranks wait."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from manifests.errors import AsvrError, InputError, RecipeError
from manifests.reader import open_manifest
from manifests.schema import Geometry
from train_stage import checkpoint as checkpoints
from train_stage.chat import ChatEncoder
from train_stage.collate import Collator
from train_stage.config import INPUT_CODES, MANIFESTS, VISION_FEATURES, ResolvedPhase, TrainConfig, ValidationConfig
from train_stage.image_tokens import ImageTokens
from train_stage.samples import Samples, load_samples
from train_stage.tables import Tables
from train_stage.tokenizer import load_tokenizer
from train_stage.tower import read_tower_config, tower_grid
from train_stage.validation import validation_phase, validation_tables

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PhaseData:
    """A phase without its model: the tables of each group of its manifests, its samples, and what makes rows of them."""

    tables: dict[str, Tables]
    geometry: Geometry
    samples: Samples
    collator: Collator
    held_out: tuple[Samples, Collator] | None = None


@dataclass
class Ahead:
    """What `load_ahead` has made, by phase, and the error that stopped it, if one did.

    settings are `checkpoint.settings_of` the phases in `phases` as they were read: when their turn comes, days later,
    records and manifests may have become others, which are not what they train on. Rank 0 has them, which compares and
    saves; the others need not hash a model's files.
    """

    phases: dict[str, PhaseData] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: AsvrError | None = None


def load_ahead(config: TrainConfig) -> Ahead:
    """The data of all phases that this process sees no end of. Not collective; the data is the same on every rank.

    An error is kept for when the ranks can speak of it together.
    """
    ahead, first = Ahead(), os.environ.get("RANK", "0") == "0"
    try:
        for phase in (config.phase(own.name) for own in config.phases):
            newest = checkpoints.newest(config.phase_folder(phase.name))
            settings = checkpoints.settings_of(config, phase.name) if first or newest is not None else None
            if newest is not None and settings is not None:  # in vain, if it is not of this configuration
                checkpoints.check_fits(newest, settings)
            if newest is None or not newest.final:
                if settings is not None:
                    ahead.settings[phase.name] = settings
                ahead.phases[phase.name] = load_data(config, phase)
    except AsvrError as error:
        ahead.error = error
    return ahead


def load_data(config: TrainConfig, phase: ResolvedPhase) -> PhaseData:
    """Open a phase's manifests, read and join its records, and make the node-local copies of what it trains on."""
    tables, geometry = open_tables(phase)
    samples, collator = read_samples(config, phase, tables, geometry)
    validation = phase.validation
    held_out = read_held_out(config, phase, validation, tables, geometry) if validation else None
    return PhaseData(tables, geometry, samples, collator, held_out)


def read_held_out(
    config: TrainConfig,
    phase: ResolvedPhase,
    validation: ValidationConfig,
    tables: Mapping[str, Tables],
    geometry: Geometry,
) -> tuple[Samples, Collator]:
    """As `read_samples`, of what a phase is validated on; `tables` and geometry are those of the phase."""
    own = validation_tables(phase, validation, tables)
    return read_samples(config, validation_phase(phase, validation), own, geometry)


def read_samples(
    config: TrainConfig, phase: ResolvedPhase, tables: Mapping[str, Tables], geometry: Geometry
) -> tuple[Samples, Collator]:
    """The samples of a phase, joined with `tables`, and what makes micro-batches of them."""
    grid = tower_grid(read_tower_config(config.model.vision_tower), geometry.size)
    tokenizer = load_tokenizer(config.model)
    encoder = ChatEncoder(tokenizer, config.model.image_token)
    samples, report = load_samples(phase, encoder, ImageTokens(geometry, grid), tables, config.workers, config.seed)
    for line in report.lines():
        log.info("phase %s: %s", phase.name, line)
    trained_on = [
        name for name in (*(term.name for term in phase.terms), VISION_FEATURES, INPUT_CODES) if name in tables
    ]
    for name in trained_on:
        tables[name].open_values(samples.pictures.rows[name])
    pad, parity = int(tokenizer.pad_token_id), phase.reference_parity
    collator = Collator(samples, tables, trained_on, geometry, grid, encoder.image_token_id, pad, parity)
    _ = collator.blank_codes  # it is looked for now, not in the first step that needs it
    return samples, collator


def open_tables(phase: ResolvedPhase) -> tuple[dict[str, Tables], Geometry]:
    """The tables of each group of a phase's manifests, and its geometry."""
    # Also those that no term predicts: a phase without terms sees the very pictures that one with codes would see.
    opened: dict[tuple[str, ...], Tables] = {}
    tables: dict[str, Tables] = {}
    for name, paths in phase.all_manifests.items():
        if paths not in opened:
            opened[paths] = Tables([open_manifest(path) for path in paths])
        tables[name] = opened[paths]
    return tables, phase_geometry(phase, tables)


def phase_geometry(phase: ResolvedPhase, tables: Mapping[str, Tables]) -> Geometry:
    """The geometry of a phase: its own, else that of its manifests, else that of the first term that has some.

    The phase's manifests must equal it; those of a term may be made from larger or smaller views of the same cut, but
    for `anyres`, where the size of a view decides how an image is tiled.
    """
    found = {name: own.geometry for name, own in tables.items()}
    geometry = phase.geometry or next(iter(found.values()), None)
    if geometry is None:
        raise RecipeError(f"phase {phase.name} names no manifests, so it must give its geometry")
    for name, own in found.items():
        if own != (
            geometry
            if name in (MANIFESTS, VISION_FEATURES, INPUT_CODES)
            else geometry.model_copy(update={"size": own.size})
        ):
            raise InputError(
                f"phase {phase.name} asks for geometry {geometry.model_dump_json()} but its {name} have "
                f"{own.model_dump_json()}: remove geometry from the phase, or tokenize again"
            )
    return geometry
