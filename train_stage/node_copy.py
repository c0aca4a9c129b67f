"""A manifest's values on the node's own disk: one flat file, in which the shards that a run needs are filled in.

The file has the size of the whole set, and holes where no run has needed a shard yet. A record beside it has one
character for each shard, `1` once the shard's values are on the disk; it is what makes a copy whole, and what an
interrupted one goes on from.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from manifests.atomic import make_folder, storage_errors, write_atomically
from manifests.errors import VerificationFailed
from manifests.hashes import cache_dir
from manifests.parallel import ordered_map
from manifests.reader import OpenManifest
from manifests.schema import ShardEntry
from manifests.shard_reader import read_parquet
from manifests.shards import list_values, value_column

log = logging.getLogger(__name__)


class NodeCopy:
    """The values of a manifest by view; `shard_start` int64 (shards + 1,) are the views before each shard.

    Values are little-endian and of the type that the shards have, `view` = P x D codes or P x W numbers of each view.
    """

    def __init__(self, manifest: OpenManifest, shard_start: NDArray[np.int64]) -> None:
        spec, column = manifest.manifest.producer, value_column(manifest.manifest.producer)
        self.manifest, self.shard_start, self.kind = manifest, shard_start, column.kind
        self.dtype = column.dtype.newbyteorder("<")
        self.view = spec.positions * spec.values
        self.path = cache_dir() / column.kind / f"{manifest.digest}.{self.dtype.name}"
        self.size = int(shard_start[-1]) * self.view * self.dtype.itemsize
        self._starts: list[int] = shard_start.tolist()  # of a list, one number is found ten times as fast
        self._here = np.zeros(len(manifest.shards), np.bool_)
        self._numbers: NDArray[Any] = np.empty(0, self.dtype)

    @property
    def record(self) -> Path:
        """Where it is written which shards are there."""
        return self.path.with_suffix(".shards")

    def values(self, first: int, views: int) -> NDArray[Any]:
        """The values of some views of one row, flat."""
        if not self._here[bisect_right(self._starts, first) - 1]:
            raise RuntimeError(f"view {first} of {self.manifest.folder} was not asked for when its values were opened")
        return self._numbers[first * self.view : (first + views) * self.view]

    def open(self, first_views: NDArray[np.int64]) -> None:
        """Copy the shards that have these views, as far as they are not there yet, and map the file.

        Of a node's ranks one copies and the others wait. Raises VerificationFailed for a shard that is not the
        manifest's, StorageError where one cannot be read or the copy not be written.
        """
        if self.size == 0 or len(first_views) == 0:
            return
        wanted = np.unique(np.searchsorted(self.shard_start, first_views, side="right") - 1)
        with storage_errors("write", self.path):
            make_folder(self.path.parent)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                here = self._recorded()
                missing = wanted[~here[wanted]].tolist()
                if missing:
                    self._fill(missing, len(wanted))
                    here[wanted] = True
            self._here = here
            self._numbers = np.memmap(self.path, dtype=self.dtype, mode="r")

    def _recorded(self) -> NDArray[np.bool_]:
        """bool (shards,): those that are there; the file is begun anew where it or its record is not whole."""
        try:
            marks = np.frombuffer(self.record.read_bytes(), np.uint8)
            if len(marks) == len(self._here) and self.path.stat().st_size == self.size:
                return marks == ord("1")
        except FileNotFoundError:
            pass
        # The record goes first: without it nothing is believed. Another run may still read the file that is replaced.
        self.record.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        with self.path.open("wb") as file:
            file.truncate(self.size)
            os.fsync(file.fileno())
        write_atomically(self.record, b"0" * len(self._here))
        return np.zeros(len(self._here), np.bool_)

    def _fill(self, missing: Sequence[int], wanted: int) -> None:
        shards = [self.manifest.shards[number] for number in missing]
        views = int((self.shard_start[1:] - self.shard_start[:-1])[missing].sum())
        log.info(
            "copying %.1f MB of %s of %s to %s: %d of the %d shards that the run needs",
            views * self.view * self.dtype.itemsize / 2**20,
            self.kind, self.manifest.folder, self.path, len(missing), wanted,
        )  # fmt: skip
        with self.path.open("r+b", buffering=0) as file, self.record.open("r+b", buffering=0) as record:
            # The next shard is read and hashed while this one is decoded and written.
            fetched = ordered_map(lambda shard: fetch(self.manifest, shard), shards, threads=1)
            for number, shard, data in zip(missing, shards, fetched, strict=True):
                file.seek(int(self.shard_start[number]) * self.view * self.dtype.itemsize)
                rest = self._decoded(number, shard, data).data.cast("B")
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
                record.seek(number)
                record.write(b"1")
                os.fsync(record.fileno())

    def _decoded(self, number: int, shard: ShardEntry, data: bytes) -> NDArray[Any]:
        where = self.manifest.store.where(shard.path)
        values, starts = list_values(read_parquet(pa.py_buffer(data), where, [self.kind])[self.kind])
        views = int(self.shard_start[number + 1] - self.shard_start[number])
        lengths = np.diff(starts)
        whole = (lengths >= self.view).all() and not (lengths % self.view).any()
        if len(lengths) != shard.rows or not whole or len(values) != views * self.view:
            raise VerificationFailed(
                f"{where} has rows that do not hold {self.view} {self.kind} a view: run asvr verify on its folder"
            )
        return np.ascontiguousarray(values, dtype=self.dtype)


def fetch(manifest: OpenManifest, shard: ShardEntry) -> bytes:
    """The bytes of a shard; VerificationFailed unless they are those that the manifest names."""
    data = manifest.store.read(shard.path)
    if len(data) != shard.bytes or hashlib.sha256(data).hexdigest() != shard.sha256:
        raise VerificationFailed(
            f"{manifest.store.where(shard.path)} did not arrive as the file that its manifest names (sha256 differs): "
            "run the command again, and asvr verify on its folder if that says the same"
        )
    return data
