"""The tokenize job: inventory, plan, engine, commits, manifest. The driver's side, without torch or Ray until there is work.

A run does what is missing and nothing else, so the same command resumes a killed job, takes in new images, and does
nothing when there is nothing to do.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin

import pyarrow as pa
import pyarrow.compute as pc

from manifests.commits import (
    CommitRecord,
    ManifestHeader,
    assemble_manifest,
    commit_path,
    list_commits,
    write_commit,
)
from manifests.errors import Interrupted, StorageError
from manifests.fingerprint import fingerprint
from manifests.schema import FeaturesSpec, Geometry, Manifest, Producer
from manifests.shards import value_column
from manifests.storage import Store
from tokenize_stage.budget import RejectBudget
from tokenize_stage.config import StageModel, TokenSetConfig
from tokenize_stage.engines import run_units
from tokenize_stage.identity import Identity, fingerprint_keys, identify
from tokenize_stage.outcomes import UnitFailed
from tokenize_stage.output_folder import (
    SOURCE_ERRORS_NAME,
    JobFile,
    complete_manifest,
    read_folder,
    read_records,
    refuse_other_settings,
    write_job_file,
    write_source_errors,
)
from tokenize_stage.progress import Progress, Tracker
from tokenize_stage.provenance import installed_versions
from tokenize_stage.signals import StopSignal, stop_on_signals
from tokenize_stage.sizes import image_bytes, images_of_a_unit
from tokenize_stage.sources import Inventory, take_inventory
from tokenize_stage.sources.inventory import ABSENT
from tokenize_stage.units import Plan, plan_units
from tokenize_stage.worker import WorkOrder, usable_cores

FAILED_UNITS_IN_A_ROW = 3
"""So many units whose source cannot be read mean that the storage is gone: the job stops."""

_log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=StageModel)


@dataclass(frozen=True)
class JobResult:
    """What a run did. `plan` is None when the set was complete, so that nothing was written or even planned."""

    manifest: Manifest
    plan: Plan | None
    encoded: int
    copied: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """A token set with its settings resolved: what the rest of this file works on."""

    config: TokenSetConfig
    identity: Identity
    geometry: Geometry
    keys: dict[str, Any]
    store: Store

    @property
    def spec(self) -> Producer:
        return self.identity.spec

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.keys)


def run_job(config: TokenSetConfig, *, replace: bool = False, progress: Progress | None = None) -> JobResult:
    """Bring `config.output` up to date with its source and return what was done.

    `replace` allows another fingerprint in the folder: its manifest stays until the new one takes its place.
    Raises `InputError` (source or tokenizer), `FingerprintMismatch` (before a model is loaded), `LeaseHeld`,
    `BudgetExceeded`, `StorageError`, `EnvironmentProblem`, and `Interrupted` on Ctrl-C or SIGTERM. What is
    committed stays committed whichever it is.
    """
    began = time.monotonic()
    job = _resolve(config)
    if not replace:
        refuse_other_settings(job.store, job.keys)
    try:
        with stop_on_signals():
            inventory = take_inventory(config.source)
            manifest = complete_manifest(job.store, job.fingerprint, inventory, config.max_reject_rate)
            if manifest is not None:
                return JobResult(manifest, None, 0, 0, time.monotonic() - began)
            with job.store.lease("tokenize"):
                return _run(job, inventory, replace, progress, began)
    except StopSignal as stop:
        committed = len(list_commits(job.store))
        raise Interrupted(
            f"stopped by a signal with {committed} units committed in {job.store.location}: "
            "run the same command again to go on from there",
            stop.signum,
        ) from stop


def _resolve(config: TokenSetConfig) -> Job:
    tokenizer = _anchored(config.tokenizer)
    identity = identify(tokenizer, config.geometry.resolve())
    geometry = config.geometry.resolve(identity.spec.settings["image_mean"])
    keys = fingerprint_keys(identity.spec, geometry, config.compute_dtype)
    return Job(config.model_copy(update={"tokenizer": tokenizer}), identity, geometry, keys, Store.open(config.output))


def _anchored(tokenizer: Model) -> Model:
    """The tokenizer with its local paths absolute, because workers on a cluster have another current folder."""
    choices = {name for name, field in type(tokenizer).model_fields.items() if get_origin(field.annotation) is Literal}
    located: dict[str, Any] = {
        name: type(value)(Path(value).absolute())
        for name, value in tokenizer
        if name not in choices and isinstance(value, str | Path) and Path(value).exists()
    }
    located |= {name: _anchored(value) for name, value in tokenizer if isinstance(value, StageModel)}
    return tokenizer.model_copy(update=located)


def _run(job: Job, inventory: Inventory, replace: bool, progress: Progress | None, began: float) -> JobResult:
    """Everything that needs the lease."""
    store, config = job.store, job.config
    if not replace:
        refuse_other_settings(store, job.keys)  # once more: another driver may have been here a moment ago
    folder = read_folder(store, job.fingerprint, replace=replace)
    members = [(name, pa.table(record.members.model_dump())) for name, record in folder.units.items()]
    plan = plan_units(inventory.table, members, images_of_a_unit(config.unit_size, job.spec))
    _announce(job, inventory, plan)
    budget = _budget(config, inventory, plan, folder.units)
    budget.check()

    units_total = len(set(folder.units) - set(plan.emptied) | {unit.name for unit in plan.units})
    write_job_file(
        store,
        JobFile(
            fingerprint=job.fingerprint,
            fingerprint_keys=job.keys,
            images=inventory.images,
            units=units_total,
            source_errors=len(inventory.errors),
        ),
    )
    write_source_errors(store, inventory)
    for name in (*folder.stale, *plan.emptied):
        store.delete(commit_path(name))
    encoded, copied = _tokenize(job, inventory, plan, budget, progress, units_total)
    manifest = assemble_manifest(store, _header(job, inventory), read_records(store))
    return JobResult(manifest, plan, encoded, copied, time.monotonic() - began)


def _budget(
    config: TokenSetConfig, inventory: Inventory, plan: Plan, committed: Mapping[str, CommitRecord]
) -> RejectBudget:
    """The budget with the rejects that are certain before anything is read: the committed ones and the missing files."""
    budget = RejectBudget(inventory.images, config.max_reject_rate)
    for name in set(committed) - set(plan.emptied) - {unit.name for unit in plan.units}:
        budget.count(committed[name])
    for unit in plan.units:
        missing = unit.members.filter(pc.equal(unit.members["size"], ABSENT))
        if missing.num_rows:
            example = f"{missing['image_id'][0].as_py()}: no such file below {inventory.root}"
            budget.expect_missing(unit.name, missing.num_rows, example)
    return budget


def _tokenize(
    job: Job, inventory: Inventory, plan: Plan, budget: RejectBudget, progress: Progress | None, units_total: int
) -> tuple[int, int]:
    """Run the plan's units and commit each as it comes; images encoded and copied."""
    config, store = job.config, job.store
    if not plan.units:
        return 0, 0
    pending = sum(unit.members.num_rows for unit in plan.units)
    tracker = Tracker(
        store,
        progress,
        done=inventory.images - pending,
        total=inventory.images,
        units_done=units_total - len(plan.units),
        units_total=units_total,
    )
    tracker.start(budget.rejected)
    order = WorkOrder(
        output=store.location,
        root=inventory.root.absolute(),
        geometry=job.geometry,
        tokenizer=config.tokenizer,
        spec=job.spec,
        fingerprint=job.fingerprint,
        dtype=config.compute_dtype,
        device=config.device,
        batch_size=config.batch_size,
        torch_threads=config.torch_threads or usable_cores(),
        decode_threads=config.decode_threads,
        max_pixels=config.max_pixels,
    )
    encoded = copied = in_a_row = 0
    failed: list[UnitFailed] = []
    ray = config.ray if config.engine == "ray" else None
    with closing(run_units(order, plan.units, ray=ray, on_images=tracker.on_images)) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, UnitFailed):
                _log.error("unit %s failed: %s", outcome.unit, outcome.message)
                failed.append(outcome)
                in_a_row += 1
                if in_a_row == FAILED_UNITS_IN_A_ROW:
                    break
                continue
            in_a_row = 0
            write_commit(store, outcome.record)
            budget.count(outcome.record)
            tracker.on_unit(outcome, budget.rejected)
            encoded += outcome.metrics.encoded
            copied += outcome.metrics.copied
            budget.check()
    if failed:
        raise StorageError(
            f"{len(failed)} of {len(plan.units)} units could not be read (first {failed[0].unit}: {failed[0].message}); "
            "the other units are kept"
        )
    return encoded, copied


def _announce(job: Job, inventory: Inventory, plan: Plan) -> None:
    """The start-up block: the derived numbers."""
    config, spec = job.config, job.spec
    _log.info(
        "%d images in %s, %d source errors; %d new, %d changed, %d removed, %d committed",
        inventory.images, inventory.source.location, len(inventory.errors),
        plan.added, plan.changed, plan.removed, plan.unchanged,
    )  # fmt: skip
    _log.info(
        "%d units of up to %d images to do, %s engine, %d positions x %d %s an image, at most %d rejects",
        len(plan.units), images_of_a_unit(config.unit_size, spec), config.engine, spec.positions, spec.values,
        value_column(spec).kind, int(config.max_reject_rate * inventory.images),
    )  # fmt: skip
    if plan.units and isinstance(spec, FeaturesSpec):
        pending = sum(unit.members.num_rows for unit in plan.units)
        _log.warning(
            "features in %s take %.3f MB an image, %.2f GB for the %d images to do, before compression; %.2f GB are free",
            spec.dtype, image_bytes(spec) / 1e6, image_bytes(spec) * pending / 1e9, pending,
            shutil.disk_usage(job.store.location).free / 1e9,
        )  # fmt: skip
    for error in inventory.errors[:5]:
        _log.warning("source row %d: %s", error.row, error.message)
    if len(inventory.errors) > 5:
        _log.warning("and %d more source errors, all in %s", len(inventory.errors) - 5, SOURCE_ERRORS_NAME)


def _header(job: Job, inventory: Inventory) -> ManifestHeader:
    return ManifestHeader(
        fingerprint_keys=job.keys,
        tokenizer=job.spec,
        geometry=job.geometry,
        codebooks=job.identity.codebooks(),
        source=inventory.source,
        source_errors=len(inventory.errors),
        command=sys.argv,
        versions=installed_versions(),
    )
