"""Say cheaply how far a token set is: from its manifest or, while a job has none yet, from its commit records."""

from __future__ import annotations

from pathlib import Path

from manifests.commits import commit_path, list_commits, read_commit
from manifests.errors import InputError, VerificationFailed
from manifests.reader import load_manifest, shard_problem
from manifests.report import Problem, State, StatusReport
from manifests.schema import MANIFEST_NAME
from manifests.storage import LEASE_NAME, Store


def status(folder: str | Path) -> StatusReport:
    """How far the token set in an output folder is. Opens no shard.

    Raises `InputError` when the folder holds nothing of a token set.
    """
    place = Path(folder)
    store = Store.open(place)
    if not any(store.exists(name) for name in (MANIFEST_NAME, LEASE_NAME, "commits")):
        raise InputError(f"{place} holds no token set: give the output folder of a tokenize job")
    owner = store.lease_owner()
    held = str(owner) if owner else None
    if not store.exists(MANIFEST_NAME):
        return _from_commits(store, "in progress" if owner else "interrupted", held)
    try:
        opened = load_manifest(place)
    except VerificationFailed as error:
        problems = [Problem("manifest_invalid", MANIFEST_NAME, str(error))]
        return StatusReport(problems=problems, state="in progress" if owner else "interrupted", owner=held)
    problems = [problem for shard in opened.shards if (problem := shard_problem(store, shard))]
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
        state=state,
        owner=held,
    )


def _committed_since(store: Store, listed: set[str]) -> bool:
    """Whether a commit record newer than the manifest names a shard that the manifest does not list.

    Only newer records are read, so a large finished set costs one look at each record's time.
    """
    written = store.path(MANIFEST_NAME).stat().st_mtime_ns
    for unit in list_commits(store):
        try:
            if store.path(commit_path(unit)).stat().st_mtime_ns <= written:
                continue
            record = read_commit(store, unit)
        except (FileNotFoundError, VerificationFailed):  # a driver that started a moment ago may take records away
            return True
        if record.shard and record.shard.path not in listed:
            return True
    return False


def _from_commits(store: Store, state: State, owner: str | None) -> StatusReport:
    problems: list[Problem] = []
    counts = {"images": 0, "ok": 0, "rejected": 0, "shards": 0}
    fingerprints = set()
    for unit in list_commits(store):
        try:
            record = read_commit(store, unit)
        except VerificationFailed as error:
            problems.append(Problem("commit_invalid", commit_path(unit), str(error)))
            continue
        counts["images"] += len(record.members)
        counts["rejected"] += len(record.rejects)
        counts["ok"] += record.shard.rows if record.shard else 0
        counts["shards"] += 1 if record.shard else 0
        fingerprints.add(record.fingerprint)
    if len(fingerprints) > 1:
        message = f"the commit records have {len(fingerprints)} fingerprints: run the job again with --replace"
        problems.append(Problem("fingerprint_mismatch", "commits", message))
    mark = fingerprints.pop() if len(fingerprints) == 1 else None
    return StatusReport(**counts, fingerprint=mark, problems=problems, state=state, owner=owner)
