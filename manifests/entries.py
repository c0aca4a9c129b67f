"""Files that a manifest names: whether they are there, and whether they are the ones it means."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from manifests.errors import VerificationFailed
from manifests.report import Problem
from manifests.schema import FileEntry, ShardEntry
from manifests.storage import Store

_ADVICE = ": run the tokenize stage again to write it anew"


def size_problem(store: Store, entry: FileEntry) -> str | None:
    """What is wrong with a file's presence or size, or None."""
    return _size_problem(store, entry, store.size_if_there(entry.path))


def shard_problems(store: Store, shards: Sequence[ShardEntry]) -> Iterator[Problem]:
    """The shards that are missing or have another size; on an object store this takes a listing, not a look at each."""
    for shard, found in zip(shards, store.sizes([shard.path for shard in shards]), strict=True):
        if problem := shard_problem(store, shard, found):
            yield problem


def shard_problem(store: Store, shard: ShardEntry, found: int | None) -> Problem | None:
    """The same of one shard, of which the store found this size, or none."""
    message = _size_problem(store, shard, found)
    if message is None:
        return None
    return Problem("shard_missing" if found is None else "shard_size", shard.path, message)


def _size_problem(store: Store, entry: FileEntry, found: int | None) -> str | None:
    if found == entry.bytes:
        return None
    path = store.where(entry.path)
    return f"{path} is missing" if found is None else f"{path} has {found} bytes, its manifest says {entry.bytes}"


def read_entry(store: Store, entry: FileEntry, *, limit: int) -> bytes:
    """The bytes of a file beside the manifest, after its size (at most `limit`) and sha256 proved right."""
    problem = size_problem(store, entry)
    if problem is None and entry.bytes > limit:
        problem = f"{store.where(entry.path)} has {entry.bytes} bytes, more than the {limit} it can need"
    if problem:
        raise VerificationFailed(f"{problem}{_ADVICE}")
    data = store.read(entry.path)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise VerificationFailed(f"{_another(store, entry)}{_ADVICE}")
    return data


def check_entry(store: Store, entry: FileEntry) -> None:
    """The same checks of a file that is too large to be held, which is read by pieces."""
    problem = size_problem(store, entry)
    if problem is None and store.sha256(entry.path, entry.bytes) != entry.sha256:
        problem = _another(store, entry)
    if problem:
        raise VerificationFailed(f"{problem}{_ADVICE}")


def _another(store: Store, entry: FileEntry) -> str:
    return f"{store.where(entry.path)} is not the file that its manifest names (sha256 differs)"
