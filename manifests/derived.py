"""Write a token set that is made from other ones (merge, filter) into a folder of its own.

`derived.json` is the first file of such a folder: it says what the set is made of. The same command finishes an
interrupted one, another command is refused, and so is `asvr tokenize`, since no single source makes such a set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manifests.atomic import link_file
from manifests.commits import (
    CommitRecord,
    ManifestHeader,
    assemble_manifest,
    commit_path,
    list_commits,
    read_commits,
    write_commit,
)
from manifests.cut import cut_unit
from manifests.entries import read_entry
from manifests.errors import InputError, VerificationFailed
from manifests.fingerprint import canonical_json
from manifests.forgotten import name_digest
from manifests.reader import OpenManifest, load_manifest
from manifests.redact import command_line
from manifests.schema import Manifest, ShardEntry, SourceIdentity
from manifests.shards import shard_name
from manifests.storage import LEASE_FILES, Store

DERIVED_NAME = "derived.json"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FinishedSet:
    """A complete set to take from: its manifest, and its units, each of which has a commit record."""

    opened: OpenManifest
    units: list[str]

    @property
    def store(self) -> Store:
        return self.opened.store

    @property
    def location(self) -> str:
        return self.store.location

    def records(self) -> Iterator[CommitRecord]:
        """The commit records in unit order, one at a time: all of a large set's would not fit into memory."""
        return read_commits(self.store)


def finished_set(location: str | Path) -> FinishedSet:
    """Open a set whose manifest and commit records agree.

    Raises `InputError` where no manifest is or the set is being written, and `VerificationFailed` for a damaged one.
    """
    opened = load_manifest(location)
    store = opened.store
    units, committed, rejected = [], set(), 0
    for record in read_commits(store):
        units.append(record.unit)
        committed |= {record.shard.path} if record.shard else set()
        rejected += len(record.rejects)
    listed = {shard.path for shard in opened.shards}
    if listed - committed:
        raise InputError(
            f"{store.location} has no commit record for {len(listed - committed)} of its shards "
            f"(first {min(listed - committed)}): run asvr verify {store.location} --rebuild first"
        )
    if committed - listed or rejected != opened.manifest.totals.rejected:
        raise InputError(f"{store.location} is not finished: run its asvr tokenize to the end first")
    return FinishedSet(opened, units)


def choose(
    one: FinishedSet, ok: npt.NDArray[np.bool_], rejected: npt.NDArray[np.bool_], forgotten: frozenset[str]
) -> Iterator[tuple[CommitRecord, npt.NDArray[np.bool_]]]:
    """Each unit with the mask of its members that stay; `ok` is a mask of the index, `rejected` one of the rejects.

    `forgotten`: digests of the images that the new set has forgotten, so that the command which made it does not bring
    them back.
    """
    at_ok = at_rejected = 0
    for record in one.records():
        names = {row.image_id for row in record.rejects}
        failed = np.fromiter((name in names for name in record.members.image_id), bool, len(record.members))
        keep = np.empty(len(failed), bool)
        rows = int((~failed).sum())
        keep[~failed] = ok[at_ok : at_ok + rows]
        keep[failed] = rejected[at_rejected : at_rejected + len(names)]
        at_ok, at_rejected = at_ok + rows, at_rejected + len(names)
        if forgotten:
            keep &= np.fromiter(
                (name_digest(name) not in forgotten for name in record.members.image_id), bool, len(keep)
            )
        yield record, keep


def copy_unit(one: FinishedSet, record: CommitRecord, keep: npt.NDArray[np.bool_], store: Store, name: str) -> bool:
    """Commit the members of a unit that stay under the unit name `name` in `store`; False if none does. Hold the lease."""
    if not keep.any():
        return False
    if not keep.all():
        cut = cut_unit(one.store, record, one.opened.manifest.producer, keep, name=name)
        if cut.record.shard and cut.data is not None:
            store.write(cut.record.shard.path, cut.data)
        record = cut.record
    else:
        shard = _put_whole(one.store, record.shard, store, name) if record.shard else None
        record = record.model_copy(update={"unit": name, "shard": shard})
    store.check_lease()
    write_commit(store, record)
    return True


def refuse_derived(store: Store) -> None:
    """Raise `InputError` if the folder holds a set that was made from other sets."""
    if store.exists(DERIVED_NAME):
        verb = _description(store).get("verb", "merge")
        raise InputError(
            f"{store.location} was made by asvr manifest {verb}, so no source describes it: tokenize into the sets that it "
            "was made from and make it again, or choose another output folder"
        )


def begin_derived(store: Store, description: dict[str, Any]) -> None:
    """Claim an empty folder, or one in which the very same was begun; else `InputError`. Hold the lease."""
    if store.exists(DERIVED_NAME):
        if canonical_json(_description(store)) != canonical_json(description):
            raise InputError(f"{store.location} holds another derived set: choose an empty folder")
        return
    present = [path for path in store.list() if path not in LEASE_FILES]
    if present:
        raise InputError(f"{store.location} is not empty (it has {present[0]}): choose an empty folder")
    store.write(DERIVED_NAME, json.dumps(description, indent=2).encode() + b"\n")


def _put_whole(source: Store, shard: ShardEntry, store: Store, unit: str) -> ShardEntry:
    """Copy a shard as it is, for a unit of perhaps another name: a hard link on one local disk, else its bytes.

    `VerificationFailed` when the shard has another size, or other bytes as they pass through here.
    """
    entry = shard.model_copy(update={"path": shard_name(unit, shard.sha256), "unit": unit})
    if store.size_if_there(entry.path) == entry.bytes:
        return entry
    if source.size_if_there(shard.path) != shard.bytes:
        raise VerificationFailed(
            f"{source.where(shard.path)} is missing or does not have its {shard.bytes} bytes: run asvr verify on its folder"
        )
    local = source.is_local and store.is_local
    if not (local and link_file(Path(source.where(shard.path)), Path(store.where(entry.path)))):
        store.write(entry.path, read_entry(source, shard, limit=shard.bytes))
    return entry


def header_of(opened: OpenManifest, **changes: Any) -> ManifestHeader:
    """What a new manifest takes over from another one; `changes` replace fields of it."""
    manifest = opened.manifest
    fields: dict[str, Any] = {
        "fingerprint_keys": manifest.fingerprint_keys,
        "tokenizer": manifest.producer,
        "geometry": manifest.geometry,
        "codebooks": opened.codebooks() if manifest.tokenizer else [],
        "source": manifest.source,
        "source_errors": manifest.totals.source_errors,
        "command": command_line(),
        "versions": manifest.provenance.versions,
    }
    return ManifestHeader(**{**fields, **changes})


def publish(store: Store, header: ManifestHeader, units: Sequence[str]) -> Manifest:
    """Write the manifest of a derived set, whose units are exactly `units`. Hold the lease."""
    for unit in set(list_commits(store)) - set(units):
        store.delete(commit_path(unit))
    store.check_lease()
    return assemble_manifest(store, header, read_commits(store))


def described(identity: SourceIdentity) -> dict[str, Any]:
    """A source as JSON values."""
    return identity.model_dump(mode="json")


def _description(store: Store) -> dict[str, Any]:
    try:
        value = json.loads(store.read(DERIVED_NAME))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise VerificationFailed(
            f"{store.where(DERIVED_NAME)} is damaged: delete the folder {store.location} and make the set again"
        )
    return value
