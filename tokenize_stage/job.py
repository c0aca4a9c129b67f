"""The tokenize job: inventory, plan, engine, commits, manifest. The driver's side, without torch or Ray until there is work.

A run does what is missing and nothing else, so the same command resumes a killed job, takes in new images, and does
nothing when there is nothing to do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from manifests.commits import ManifestHeader, assemble_manifest, commit_path, list_commits, read_commits
from manifests.derived import refuse_derived
from manifests.errors import Interrupted
from manifests.reader import read_manifest
from manifests.redact import command_line
from manifests.report import mixed_devices
from manifests.schema import Manifest
from manifests.storage import Store
from tokenize_stage.announce import announce
from tokenize_stage.commit_loop import commit_units
from tokenize_stage.completeness import complete_manifest, completed_with, is_completed_with
from tokenize_stage.config import TokenSetConfig
from tokenize_stage.inventory_cache import Listing, list_source
from tokenize_stage.output_folder import (
    JobFile,
    read_job_file,
    refuse_other_settings,
    refuse_output_in_source,
    write_job_file,
    write_source_errors,
)
from tokenize_stage.planned import Planned, plan_job
from tokenize_stage.progress import Progress
from tokenize_stage.provenance import installed_versions
from tokenize_stage.resolved import Job, resolve
from tokenize_stage.signals import StopSignal, stop_on_signals
from tokenize_stage.trial import Stopwatch, Trial
from tokenize_stage.units import Plan

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobResult:
    """What a run did. `plan` is None when the set was complete, so that nothing was written or even planned.

    `listing_note` says so if the inventory was a remembered one.
    """

    manifest: Manifest
    plan: Plan | None
    encoded: int
    copied: int
    seconds: float
    listing_note: str


def run_job(
    config: TokenSetConfig,
    *,
    replace: bool = False,
    refresh: bool = False,
    retry: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> JobResult:
    """Bring `config.output` up to date with its source and return what was done.

    `replace` allows another fingerprint in the folder: its manifest stays until the new one takes its place. `refresh`
    uses nothing that is remembered of the source. `retry`: reasons whose rejects are read again.
    Raises `InputError` (source or tokenizer), `FingerprintMismatch` (before a model is loaded), `LeaseHeld`,
    `BudgetExceeded`, `StorageError`, `EnvironmentProblem`, and `Interrupted` on Ctrl-C or SIGTERM. What is
    committed stays committed whichever it is.
    """
    began = time.monotonic()
    job = _open(config, replace)
    with _stopping(job.store):
        listing = list_source(job.store, job.config.source, refresh=refresh)
        manifest = None if retry else _nothing_to_do(job, listing, refresh)
        if manifest and manifest.source == listing.source:  # else it was moved, and manifest and job file are to say so
            _remember(job.store, listing, manifest)
            return JobResult(manifest, None, 0, 0, time.monotonic() - began, listing.note)
        with job.store.lease("tokenize"):
            planned = _begin(job, listing, replace, retry)
            work = commit_units(planned, planned.plan.units, progress)
            manifest = _finish(planned)
    return JobResult(manifest, planned.plan, work.encoded, work.copied, time.monotonic() - began, listing.note)


def try_job(
    config: TokenSetConfig,
    images: int,
    *,
    replace: bool = False,
    refresh: bool = False,
    progress: Progress | None = None,
) -> Trial | None:
    """Tokenize about `images` images of what is to be done, in whole units, and measure; None if nothing is to be done.

    What is tokenized is committed, so the full run does not do it again; the manifest is left to that run. Raises what
    `run_job` raises.
    """
    job = _open(config, replace)
    with _stopping(job.store):
        listing = list_source(job.store, job.config.source, refresh=refresh)
        if _nothing_to_do(job, listing, refresh):
            return None
        with job.store.lease("tokenize"):
            planned = _begin(job, listing, replace, frozenset())
            units = planned.plan.sample(images)
            _log.info("a trial of %s images in %s whole units", f"{units.images:,}", f"{len(units):,}")
            watch = Stopwatch(progress)
            work = commit_units(planned, units, watch)
    return watch.measured(work, left=planned.plan.units.images - units.images, total=planned.inventory.images)


def preview_job(config: TokenSetConfig, *, replace: bool = False, refresh: bool = False) -> Planned | JobResult:
    """What `run_job` would do: the plan, or the result of a set that is complete. Takes no lease and writes nothing."""
    began = time.monotonic()
    job = _open(config, replace)
    listing = list_source(job.store, job.config.source, refresh=refresh)
    if manifest := _nothing_to_do(job, listing, refresh=False):
        return JobResult(manifest, None, 0, 0, time.monotonic() - began, listing.note)
    return plan_job(job, listing, replace=replace, retry=frozenset())


def _open(config: TokenSetConfig, replace: bool) -> Job:
    job = resolve(config)
    refuse_derived(job.store)
    refuse_output_in_source(job.store, job.config.source)
    if not replace:
        refuse_other_settings(job.store, job.keys)
    return job


@contextmanager
def _stopping(store: Store) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the context in one sentence, with what is committed."""
    try:
        with stop_on_signals():
            yield
    except StopSignal as stop:
        raise Interrupted(
            f"stopped by a signal with {len(list_commits(store))} units committed in {store.location}: "
            "run the same command again to go on from there",
            stop.signum,
        ) from stop


def _nothing_to_do(job: Job, listing: Listing, refresh: bool) -> Manifest | None:
    """The manifest of a complete set; but a new listing that was asked for is to be kept, which takes the lease."""
    manifest = complete_manifest(job.store, job.fingerprint, listing, job.config.max_reject_rate)
    return None if refresh and listing.is_kept else manifest


def _remember(store: Store, listing: Listing, manifest: Manifest) -> None:
    """Keep the listing of a complete set, and that both belong together, so that the next run need not find out again."""
    if not listing.is_kept or is_completed_with(store, listing):
        return
    with store.lease("tokenize"):
        if read_manifest(store.location)[1] != manifest:
            return  # another driver was here a moment ago
        listing.remember()
        if listing.taken:
            write_source_errors(store, listing.taken)
        write_job_file(store, read_job_file(store).model_copy(update={"completed": completed_with(store, listing)}))


def _begin(job: Job, listing: Listing, replace: bool, retry: frozenset[str]) -> Planned:
    """Plan, say what is planned, and bring the folder to where the first unit can be committed. Hold the lease."""
    store = job.store
    if not replace:
        refuse_other_settings(store, job.keys)  # once more: another driver may have been here a moment ago
    listing.remember()
    planned = plan_job(job, listing, replace=replace, retry=retry)
    announce(planned)
    planned.budget.check()
    write_job_file(store, _job_file(planned))
    write_source_errors(store, planned.inventory)
    for name in (*planned.stale, *planned.plan.emptied):
        store.delete(commit_path(name))
    return planned


def _finish(planned: Planned) -> Manifest:
    """Write the manifest, and remember of which inventory it is."""
    job, store, inventory = planned.job, planned.job.store, planned.inventory
    header = ManifestHeader(
        fingerprint_keys=job.keys,
        tokenizer=job.spec,
        geometry=job.geometry,
        codebooks=job.identity.codebooks(),
        source=inventory.source,
        source_errors=len(inventory.errors),
        command=command_line(),
        versions=installed_versions(),
    )
    store.check_lease()
    manifest = assemble_manifest(store, header, read_commits(store))
    write_job_file(store, _job_file(planned).model_copy(update={"completed": completed_with(store, planned.listing)}))
    if note := mixed_devices(manifest.provenance.numerics):
        _log.warning("%s", note)
    return manifest


def _job_file(planned: Planned) -> JobFile:
    job = planned.job
    return JobFile(
        fingerprint=job.fingerprint,
        config=job.config.model_dump(mode="json"),
        fingerprint_keys=job.keys,
        images=planned.inventory.images,
        units=planned.units_total,
        source_errors=len(planned.inventory.errors),
    )
