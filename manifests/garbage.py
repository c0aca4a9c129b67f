"""Remove what a token set no longer needs: files of its own kinds that no manifest, retained snapshot or commit record names.

A killed or superseded worker leaves such orphans, and so do rewritten units, `--replace` and `forget`. Only names that the
commit protocol makes are ever candidates, so that a file somebody else put into the folder stays; and only files
older than a safety age, so that what a worker is writing now is no candidate either.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from manifests.atomic import TEMPORARY_PREFIX, storage_errors
from manifests.commits import list_commits, read_commit
from manifests.errors import InputError
from manifests.reader import load_manifest
from manifests.schema import MANIFEST_NAME
from manifests.storage import LEASE_NAME, Store

SAFETY_AGE_S = 24 * 3600.0
"""Default age below which nothing is removed."""

SNAPSHOTS = "snapshots/"

_OWN = re.compile(
    r"shards/(?P<unit>[A-Za-z0-9_][A-Za-z0-9._-]*)-[0-9a-f]{16}\.parquet"
    r"|(index|rejects)-[0-9a-f]{16}\.parquet"
    r"|codebook-[0-9a-f]{16}\.safetensors"
    r"|shards-[0-9a-f]{16}\.json\.zst"
)
_SNAPSHOT = re.compile(r"snapshots/[0-9a-f]{16}\.json")
_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + r"[0-9]+-[0-9a-f]{16}")


@dataclass(frozen=True)
class Orphan:
    """A file that can go."""

    path: str
    bytes: int


@dataclass(frozen=True)
class GcReport:
    """What was removed (in a dry run: would be), and what is still too young; `snapshots` are those that stay."""

    removed: list[Orphan]
    young: list[Orphan]
    snapshots: list[str]

    @property
    def bytes(self) -> int:
        """Of what was removed."""
        return sum(orphan.bytes for orphan in self.removed)


def collect_garbage(
    store: Store, *, older_than: float = SAFETY_AGE_S, keep_snapshots: int | None = None, dry_run: bool = False
) -> GcReport:
    """Remove the orphans of an output folder that are older than `older_than` seconds by the store's own clock marks.

    All snapshots are kept, or the newest `keep_snapshots` of them and any younger than that; the one that `manifest.json`
    is a copy of always stays. Raises `InputError` where no token set is, `LeaseHeld` while a job runs, and
    `VerificationFailed` when a manifest, snapshot or commit record is damaged, since nobody knows then what it names.
    """
    if not any(store.exists(name) for name in (MANIFEST_NAME, LEASE_NAME)) and not list_commits(store):
        raise InputError(f"{store.location} holds no token set: give the output folder of a tokenize job")
    if dry_run:
        return _collect(store, older_than, keep_snapshots, dry_run=True)
    with store.lease("gc"):
        return _collect(store, older_than, keep_snapshots, dry_run=False)


def remove_snapshots(store: Store, paths: Iterable[str]) -> None:
    """Remove some snapshots and then, whatever its age, every orphan. Hold the lease.

    Snapshots go first: at no moment does one name a file that is gone already.
    """
    for path in paths:
        store.check_lease()
        store.delete(path)
    _collect(store, older_than=-float("inf"), keep_snapshots=None, dry_run=False)


def list_snapshots(store: Store) -> list[str]:
    """The snapshots of an output folder."""
    return [path for path in store.list(SNAPSHOTS) if _SNAPSHOT.fullmatch(path)]


def _collect(store: Store, older_than: float, keep_snapshots: int | None, *, dry_run: bool) -> GcReport:
    now = time.time()
    ages = {path: (now - stat.mtime_ns / 1e9, stat.size) for path, stat in store.walk()}
    ages |= {path: (now - mtime, size) for path, mtime, size in _abandoned(store)}
    stay = _retained(store, list_snapshots(store), ages, older_than, keep_snapshots)
    named = set(_named(store, stay))
    named |= set(_committed(store, [path for path in ages if path not in named]))
    removed: list[Orphan] = []
    young: list[Orphan] = []
    for path in sorted(ages, key=lambda path: (not path.startswith(SNAPSHOTS), path)):
        is_snapshot = _SNAPSHOT.fullmatch(path)
        own = is_snapshot or _OWN.fullmatch(path) or _TEMPORARY.fullmatch(path.rpartition("/")[2])
        if not own or path in named or path in stay:
            continue
        age, size = ages[path]
        (removed if age > older_than else young).append(Orphan(path, size))
    if not dry_run:
        for orphan in removed:
            store.check_lease()
            store.delete(orphan.path)
    return GcReport(removed, young, sorted(stay))


def _retained(
    store: Store,
    snapshots: Sequence[str],
    ages: dict[str, tuple[float, int]],
    older_than: float,
    keep: int | None,
) -> set[str]:
    """The snapshots that stay. One is held at a time: each lists all shards of the set."""
    if keep is None:
        return set(snapshots)
    created, digests = {}, {}
    for path in snapshots:
        opened = load_manifest(store.where(path))
        created[path], digests[path] = opened.manifest.provenance.created_at, opened.digest
    newest = sorted(snapshots, key=lambda path: (created[path], -ages[path][0]))
    stay = set(newest[-keep:] if keep else [])
    stay |= {path for path in snapshots if ages[path][0] <= older_than}
    if store.exists(MANIFEST_NAME):
        digest = hashlib.sha256(store.read(MANIFEST_NAME)).hexdigest()
        stay |= {path for path in snapshots if digests[path] == digest}
    return stay


def _named(store: Store, retained: Iterable[str]) -> Iterator[str]:
    """Every file that a manifest names."""
    current = [MANIFEST_NAME] if store.exists(MANIFEST_NAME) else []
    for path in [*sorted(retained), *current]:
        opened = load_manifest(store.where(path))
        manifest = opened.manifest
        entries = [*opened.shards, manifest.index, manifest.rejects, manifest.codebook, manifest.shards_file]
        yield from (entry.path for entry in entries if entry)


def _committed(store: Store, paths: Iterable[str]) -> Iterator[str]:
    """Those of some shards that the commit record of their unit names; no other record is read."""
    units = {match["unit"] for path in paths if (match := _OWN.fullmatch(path)) and match["unit"]}
    for unit in sorted(units & set(list_commits(store))):
        record = read_commit(store, unit)
        if record.shard:
            yield record.shard.path


def _abandoned(store: Store) -> Iterator[tuple[str, float, int]]:
    """The temporary files that killed writers left on a local disk; object stores have none."""
    if not store.is_local:
        return
    root = Path(store.location)
    with storage_errors("list", root):
        for parent, _, names in os.walk(root):
            for name in names:
                if _TEMPORARY.fullmatch(name):
                    path = Path(parent, name)
                    found = path.stat()
                    yield path.relative_to(root).as_posix(), found.st_mtime, found.st_size
