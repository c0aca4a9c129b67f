"""Say cheaply how far a token set is: from its manifest or, while a job has none yet, from its commit records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from manifests.commits import commit_path, list_commits, read_commit
from manifests.entries import shard_problems
from manifests.errors import InputError, StorageError, VerificationFailed
from manifests.live import JobProgress, LiveProgress, read_progress
from manifests.reader import load_manifest, locate_manifest
from manifests.report import Problem, State, StatusReport, mixed_devices
from manifests.schema import MANIFEST_NAME
from manifests.storage import LEASE_NAME, Store


def status(folder: str | Path) -> StatusReport:
    """How far the token set in an output folder is, with what its job says of itself. Opens no shard.

    Raises `InputError` when the folder holds nothing of a token set.
    """
    store, name = locate_manifest(folder)
    if not any(store.exists(one) for one in (name, LEASE_NAME, "commits")):
        raise InputError(f"{folder} holds no token set: give the output folder of a tokenize job")
    refuse_run(store, folder)
    live = read_progress(store)
    report = _so_far(store, name, live)
    if live is None or report.state == "complete":
        return report
    progress: JobProgress | None = live.progress
    if report.owner is None:
        progress = None if store.exists(name) else _stopped(live.progress, report, len(list_commits(store)))
    return replace(report, progress=progress, progress_age=live.age)


def _stopped(last: JobProgress, report: StatusReport, units: int) -> JobProgress:
    """How far a job that stopped had come: what it committed, for the images in work were lost with it."""
    return JobProgress(
        done=report.images,
        total=max(last.total, report.images),
        rejected=report.rejected,
        units_done=units,
        units_total=max(last.units_total, units),
        rate=0.0,
        eta=None,
        wait_share=0.0,
        workers=0,
    )


def refuse_run(store: Store, folder: str | Path) -> None:
    """`InputError` for the output of a training run, which has a lease as a token set has."""
    if store.exists("config.json") and not store.exists(MANIFEST_NAME) and not store.exists("commits"):
        raise InputError(f"{folder} is a training run, not a token set: look at it with asvr report {folder}")


def _so_far(store: Store, name: str, live: LiveProgress | None) -> StatusReport:
    owner = store.lease_owner()
    held = str(owner) if owner else None
    if not store.exists(name):
        if owner and live:
            return _from_job(store, live.progress, held)
        return _from_commits(store, "in progress" if owner else "interrupted", held)
    try:
        opened = load_manifest(store.where(name))
    except VerificationFailed as error:
        problems = [Problem("manifest_invalid", name, str(error))]
        return StatusReport(problems=problems, state="in progress" if owner else "interrupted", owner=held)
    problems = list(shard_problems(store, opened.shards))
    state: State = "complete"
    if owner:
        state = "in progress"
    elif _committed_since(store, {shard.path for shard in opened.shards}):
        state = "interrupted"
    totals = opened.manifest.totals
    return StatusReport(
        images=totals.images,
        ok=totals.ok,
        rejected=totals.rejected,
        shards=len(opened.shards),
        fingerprint=opened.manifest.fingerprint,
        problems=problems,
        notes=[note] if (note := mixed_devices(opened.manifest.provenance.numerics)) else [],
        state=state,
        owner=held,
    )


def _committed_since(store: Store, listed: set[str]) -> bool:
    """Whether a commit record newer than the manifest names a shard that the manifest does not list.

    Only newer records are read, so a large finished set costs a listing with the times of its records.
    """
    manifest = store.stat(MANIFEST_NAME)
    written = manifest.mtime_ns if manifest else 0
    times = dict(store.walk("commits/"))
    for unit in list_commits(store):
        found = times.get(commit_path(unit))
        if found and found.mtime_ns < written:
            continue
        try:
            record = read_commit(store, unit)
        except (StorageError, VerificationFailed):  # a driver that started a moment ago may take records away
            return True
        if record.shard and record.shard.path not in listed:
            return True
    return False


def _from_job(store: Store, now: JobProgress, owner: str | None) -> StatusReport:
    """What a running job counts, so that nobody who watches it reads all its records; images in work are counted too."""
    units = list_commits(store)
    try:
        mark = read_commit(store, units[0]).fingerprint if units else None
    except (StorageError, VerificationFailed):
        mark = None
    ok = now.done - now.rejected
    return StatusReport(now.done, ok, now.rejected, len(units), mark, state="in progress", owner=owner)


def _from_commits(store: Store, state: State, owner: str | None) -> StatusReport:
    problems: list[Problem] = []
    images = ok = rejected = shards = 0
    fingerprints = set()
    for unit in list_commits(store):
        try:
            record = read_commit(store, unit)
        except VerificationFailed as error:
            problems.append(Problem("commit_invalid", commit_path(unit), str(error)))
            continue
        images += len(record.members)
        rejected += len(record.rejects)
        ok += record.shard.rows if record.shard else 0
        shards += 1 if record.shard else 0
        fingerprints.add(record.fingerprint)
    if len(fingerprints) > 1:
        message = f"the commit records have {len(fingerprints)} fingerprints: run the job again with --replace"
        problems.append(Problem("fingerprint_mismatch", "commits", message))
    mark = fingerprints.pop() if len(fingerprints) == 1 else None
    return StatusReport(images, ok, rejected, shards, mark, problems, state=state, owner=owner)
