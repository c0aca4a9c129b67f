"""Restore a lost or damaged `manifest.json`: from the commit records, or from the shards where those are lost too.

Nothing is invented. What a manifest says beside its units (tokenizer, geometry, source) comes from the damaged folder's
newest snapshot of the same fingerprint, else from a manifest that the caller names (`like`), which may be of any set with
that fingerprint. Which shards are the set's, if two are of one unit:

1. the one that the unit's commit record names;
2. the one that the newest snapshot names;
3. the only one there is, if the folder has neither commit records nor snapshots; of two, neither: an error names both.

A shard that neither records nor the snapshot know stays out: perhaps it was never committed. Units rebuilt from a
snapshot keep size and time of their files, and its rejects form a unit of their own. Units rebuilt from shards alone have no
known file times, so the next job encodes their images again, and no rejects.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from manifests.commit_record import unit_order
from manifests.commits import (
    CommitRecord,
    assemble_manifest,
    commit_path,
    list_commits,
    read_commit,
    read_commits,
    write_commit,
)
from manifests.cut import cut_unit
from manifests.derived import header_of
from manifests.entries import size_problem
from manifests.errors import InputError, VerificationFailed
from manifests.forgotten import forgotten_digests, name_digest
from manifests.garbage import list_snapshots
from manifests.reader import OpenManifest, load_manifest
from manifests.rebuilt_records import FileTimes, lost_rejects, record_of
from manifests.redact import command_line
from manifests.schema import MANIFEST_NAME, Manifest, ShardEntry
from manifests.shard_reader import open_parquet
from manifests.shards import made_as, shard_mark
from manifests.storage import Store

REBUILDING_NAME = "rebuilding.json"
"""Stands in a folder while records are made from shards alone."""


@dataclass(frozen=True)
class RebuildReport:
    """The manifest, the units whose records were written anew, and what is lost for good, a sentence each."""

    manifest: Manifest
    rebuilt: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def rebuild(store: Store, like: str | Path | None = None) -> RebuildReport:
    """Write `manifest.json` again, and the commit records that are lost or damaged.

    Raises `InputError` saying what is needed when too much is lost, `VerificationFailed` when two shards could be a
    unit's, `LeaseHeld` while a job runs. Interrupted, the same call completes it.
    """
    if not (list_commits(store) or store.list("shards/")):
        raise InputError(
            f"{store.location} holds neither commit records nor shards: give the output folder of a tokenize job"
        )
    with store.lease("verify --rebuild"):
        committed, damaged = _committed(store)
        model, own = _model(store, set(committed.values()), like)
        lost = [] if own else [f"the source and its errors: taken over from {like}"]
        whole = not (committed or damaged) or store.exists(REBUILDING_NAME)
        shards = _lost_shards(store, set(committed), model, own=own, whole=whole)
        known = set(committed) | {shard.unit for shard in shards}
        lost += [
            f"unit {unit}, whose record is damaged and whose shard is not known: the next job makes it again"
            for unit in damaged - known
        ]
        if shards and not own:
            store.write(REBUILDING_NAME, b"{}\n")  # or the next call would take the first records for all there are
            lost.append("the rejects: the next job finds them again")
        if own and (shards or damaged):
            rejects = lost_rejects(model, (read_commit(store, unit) for unit in committed), known | damaged)
            if rejects:
                _commit(store, rejects, model)
        times = FileTimes(model) if own and shards else None
        for shard in shards:
            _commit(store, record_of(store, shard, model, times, lost=lost), model)
        for unit in damaged - known:
            store.delete(commit_path(unit))
        if own and not _readable(store, MANIFEST_NAME):
            _put_back(store, model)
        store.check_lease()
        manifest = assemble_manifest(store, header_of(model, command=command_line()), read_commits(store))
        store.delete(REBUILDING_NAME)
    return RebuildReport(manifest, [shard.unit for shard in shards], sorted(lost))


def _committed(store: Store) -> tuple[dict[str, str], set[str]]:
    """The fingerprint of each unit with a readable record, and the units whose record is damaged."""
    committed: dict[str, str] = {}
    damaged: set[str] = set()
    for unit in list_commits(store):
        try:
            committed[unit] = read_commit(store, unit).fingerprint
        except VerificationFailed:
            damaged.add(unit)
    return committed, damaged


def _model(store: Store, marks: set[str], like: str | Path | None) -> tuple[OpenManifest, bool]:
    """The manifest to take the header from, and whether it is one of this very folder."""
    if len(marks) > 1:
        raise InputError(
            f"{store.location} has commit records of {len(marks)} fingerprints: run its asvr tokenize --replace to the end"
        )
    newest: OpenManifest | None = None  # two are held at most: each lists all shards of the set
    for path in [*list_snapshots(store), MANIFEST_NAME]:
        own = _readable(store, path)
        if own and (not marks or own.manifest.fingerprint in marks) and (not newest or _made(own) > _made(newest)):
            newest = own
    if newest:
        return newest, True
    if like is None:
        raise InputError(
            f"{store.location} has no snapshot that says with which tokenizer, geometry and source it was made: run its asvr "
            "tokenize, which writes the manifest again, or name a manifest of the same fingerprint with --like"
        )
    opened = load_manifest(like)
    if marks and opened.manifest.fingerprint not in marks:
        raise InputError(
            f"{like} has another fingerprint than the commit records of {store.location}: name another manifest"
        )
    return opened, False


def _made(opened: OpenManifest) -> str:
    return opened.manifest.provenance.created_at


def _readable(store: Store, path: str) -> OpenManifest | None:
    if not store.exists(path):
        return None
    try:
        opened = load_manifest(store.where(path))
        if opened.manifest.tokenizer:
            opened.codebooks()
    except VerificationFailed:
        return None
    return opened


def _lost_shards(store: Store, known: set[str], model: OpenManifest, *, own: bool, whole: bool) -> list[ShardEntry]:
    """The shards that belong to the set and have no record; `whole`: there is no record at all."""
    if own:
        return [shard for shard in model.shards if shard.unit not in known and size_problem(store, shard) is None]
    if not whole:
        return []
    found: dict[str, ShardEntry] = {}
    for path in store.list("shards/"):
        entry = _entry(store, path, model.manifest.fingerprint)
        if entry is None:
            continue
        if entry.unit in found:
            raise VerificationFailed(
                f"{store.where(found[entry.unit].path)} and {store.where(path)} are both of unit {entry.unit}, and no "
                "record or snapshot says which one counts: move one of them away"
            )
        found[entry.unit] = entry
    if not found:
        raise InputError(
            f"no shard of {store.location} has the fingerprint of {model.store.location}: name another manifest with --like"
        )
    return sorted(found.values(), key=lambda entry: unit_order(entry.unit))


def _entry(store: Store, path: str, fingerprint: str) -> ShardEntry | None:
    """A shard as a record names it, if it is whole and of this fingerprint."""
    unit, _, mark = path.removeprefix("shards/").removesuffix(".parquet").rpartition("-")
    data = store.read(path)
    sha256 = hashlib.sha256(data).hexdigest()
    if not unit or sha256[:16] != mark:
        return None
    with open_parquet(pa.py_buffer(data), store.where(path)) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    if shard_mark(schema, "fingerprint") != fingerprint or not made_as(shard_mark(schema, "unit"), unit):
        return None
    return ShardEntry(path=path, bytes=len(data), sha256=sha256, unit=unit, rows=rows)


def _commit(store: Store, record: CommitRecord, model: OpenManifest) -> None:
    """Write a rebuilt record, without the images that were forgotten since the snapshot was taken."""
    digests = forgotten_digests(store)
    keep = np.asarray([name_digest(name) not in digests for name in record.members.image_id], bool)
    store.check_lease()
    if not keep.any():
        return
    if not keep.all():
        cut = cut_unit(store, record, model.manifest.producer, keep)
        if cut.record.shard and cut.data is not None:
            store.write(cut.record.shard.path, cut.data)
        record = cut.record
    write_commit(store, record)


def _put_back(store: Store, model: OpenManifest) -> None:
    """Make the folder's snapshot its manifest again, if all is there that it names: the same bytes as before."""
    if store.sizes([shard.path for shard in model.shards]) == [shard.bytes for shard in model.shards]:
        path = f"snapshots/{model.digest[:16]}.json"
        store.write(MANIFEST_NAME, store.read(path))
