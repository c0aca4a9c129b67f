"""Forget images: their rows leave shards, index, rejects and commit records, and the next job does not bring them back.

Nothing is encoded. The old shards, and the snapshots that name them, stay until `gc`, or go at once with `purge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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
from manifests.errors import InputError
from manifests.forgotten import remember_forgotten
from manifests.garbage import list_snapshots, remove_snapshots
from manifests.id_index import IdIndex
from manifests.reader import OpenManifest, load_manifest
from manifests.repeated_ids import columns_of
from manifests.schema import MANIFEST_NAME
from manifests.storage import Store

LISTING_NAME = "inventory.parquet"
"""What a job remembers of its source, every name in it; without it the source is listed again."""


@dataclass(frozen=True)
class ForgetReport:
    """How many images left the set, how many ids it did not hold, units that were rewritten, and what still holds them.

    `snapshots` are older manifests through which the images can still be read; after a purge there is none.
    """

    forgotten: int
    absent: int
    units: int
    snapshots: list[str]


def forget_images(store: Store, image_ids: Sequence[str], *, purge: bool = False) -> ForgetReport:
    """Take images out of the set in `store` and remember that they must not come back.

    An id that the set does not hold is remembered all the same. Interrupted at any moment, what stands is a whole set
    with or without the images, and the same call completes it. Raises `InputError` where no finished set is,
    `LeaseHeld` while a job runs, `VerificationFailed` for damage.
    """
    wanted = frozenset(image_ids)
    if not wanted:
        raise InputError("no image id was given: name them, or give a file with --ids")
    with store.lease("manifest forget"):
        opened = _finished(store)
        affected, emptied = _units_with(store, opened, wanted)
        remember_forgotten(store, wanted)
        for unit in affected:
            _rewrite(store, opened, read_commit(store, unit), wanted)
        store.check_lease()
        # The command line of this very call names the images: the manifest keeps the one that made the codes.
        header = header_of(opened, command=opened.manifest.provenance.command)
        assemble_manifest(store, header, (record for record in read_commits(store) if record.unit not in emptied))
        for unit in emptied:  # not before: of every unit that a manifest names there is a record
            store.delete(commit_path(unit))
        names = IdIndex(pa.chunked_array([sorted(wanted)], pa.string()))
        holding = [path for path in list_snapshots(store) if _shows(store, path, names)]
        if purge:
            store.delete(LISTING_NAME)
            remove_snapshots(store, holding)
    found = sum(affected.values())
    return ForgetReport(found, len(wanted) - found, len(affected), [] if purge else holding)


def _finished(store: Store) -> OpenManifest:
    """The manifest, whose units all have a commit record of its fingerprint."""
    if not store.exists(MANIFEST_NAME):
        raise InputError(f"{store.location} has no manifest: run its asvr tokenize to the end first")
    opened = load_manifest(store.where(MANIFEST_NAME))
    if lost := {shard.unit for shard in opened.shards} - set(list_commits(store)):
        raise InputError(
            f"{store.location} has no commit record of unit {min(lost)} ({len(lost)} such units): finish its "
            "asvr tokenize --replace, or run asvr verify --rebuild on it"
        )
    return opened


def _units_with(store: Store, opened: OpenManifest, wanted: frozenset[str]) -> tuple[dict[str, int], frozenset[str]]:
    """The units that hold some of the images, with how many, and the units that hold no other ones.

    Nothing is written before all records are seen to fit.
    """
    found, emptied = {}, set()
    for record in read_commits(store):
        if record.fingerprint != opened.manifest.fingerprint:
            raise InputError(
                f"{store.location} has units of another fingerprint than its manifest (first {record.unit}): finish its "
                "asvr tokenize --replace first"
            )
        if count := int(_holds(record, wanted).sum()):
            found[record.unit] = count
        if count == len(record.members):  # also one that a call which was interrupted has emptied
            emptied.add(record.unit)
    return found, frozenset(emptied)


def _holds(record: CommitRecord, wanted: frozenset[str]) -> npt.NDArray[np.bool_]:
    """Which members of a unit are wanted."""
    return np.fromiter((name in wanted for name in record.members.image_id), bool, len(record.members))


def _rewrite(store: Store, opened: OpenManifest, record: CommitRecord, wanted: frozenset[str]) -> None:
    keep = ~_holds(record, wanted)
    store.check_lease()
    if not keep.any():
        record = record.model_copy(update={"shard": None})  # of which nothing is to be copied
    cut = cut_unit(store, record, opened.manifest.producer, keep)
    if cut.record.shard and cut.data is not None:
        store.write(cut.record.shard.path, cut.data)
    write_commit(store, cut.record)


def _shows(store: Store, snapshot: str, wanted: IdIndex) -> bool:
    """Whether some of the images can be read through an older manifest."""
    opened = load_manifest(store.where(snapshot))
    readings = (read(["image_id"]) for read in (opened.iter_index, opened.iter_rejects))
    return any((wanted.find(names) >= 0).any() for batches in readings for names in columns_of(batches))
