"""Codes by row number: a flat, memory-mapped copy of a manifest's codes on the node's own disk.

A shard gives one random row in 4 ms, this table in microseconds. It is made once per manifest, from the shards that
the manifest names, and is keyed by the manifest's digest: rows stand in the order of the index, as
little-endian uint16 (uint32 where the shards have that), V x P x D of them each.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests.atomic import make_folder, storage_errors
from manifests.errors import InputError, VerificationFailed
from manifests.fingerprint import differing_keys
from manifests.hashes import cache_dir
from manifests.reader import OpenManifest
from manifests.schema import TokenizerSpec
from manifests.shards import code_dtype, list_values

log = logging.getLogger(__name__)

NO_ROW = -1
_BUFFER_BYTES = 8 << 20


def check_agreement(manifests: Sequence[OpenManifest]) -> None:
    """InputError, naming what differs, unless all manifests have one fingerprint: one tokenizer, one geometry."""
    first = manifests[0]
    for other in manifests[1:]:
        names = differing_keys(first.manifest.fingerprint_keys, other.manifest.fingerprint_keys)
        if names:
            raise InputError(
                f"the manifests in {first.folder} and {other.folder} were made with different settings "
                f"({'; '.join(names[:4])}): the manifests of a phase must agree in tokenizer and geometry"
            )


class CodeTables:
    """The codes of the manifests of a phase, which share one fingerprint, as one table of rows.

    source_size  int64 (rows,): bytes of the encoded image when it was tokenized
    sha256       sha256 in hex of those bytes, by row

    Makes the node-local copies that are not there yet. Raises InputError when the manifests disagree or hold features,
    VerificationFailed when one is damaged, StorageError when the cache cannot be written.
    """

    def __init__(self, manifests: Sequence[OpenManifest]) -> None:
        self.manifests = list(manifests)
        tokenizers = [manifest.tokenizer for manifest in manifests]
        self.tokenizer: TokenizerSpec = tokenizers[0]
        check_agreement(manifests)
        indexes = [manifest.index() for manifest in manifests]
        index = pa.concat_tables(indexes).combine_chunks()
        self.image_ids: pa.ChunkedArray = index["image_id"]
        self.sha256: pa.ChunkedArray = index["sha256"]
        self.source_size: NDArray[np.int64] = index["source_size"].to_numpy()
        self._tables = [_open_table(manifest, rows.num_rows) for manifest, rows in zip(manifests, indexes, strict=True)]
        self._ends = np.cumsum([rows.num_rows for rows in indexes])
        self._refuse_ambiguous()

    def find(self, image_ids: Sequence[str]) -> NDArray[np.int64]:
        """Row of each image, int64, NO_ROW for those that no manifest has."""
        found = pc.index_in(pa.array(image_ids, pa.string()), value_set=self.image_ids.combine_chunks())
        return np.asarray(found.fill_null(NO_ROW).to_numpy(zero_copy_only=False), dtype=np.int64)

    def codes(self, row: int) -> NDArray[np.integer[Any]]:
        """Codes (V, P, D) of a row, as stored."""
        table = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[table - 1]) if table else 0
        values = self._tables[table][row - start]
        return values.reshape(-1, self.tokenizer.positions, self.tokenizer.depth)

    def codebooks(self) -> list[NDArray[np.float32]]:
        """D arrays float32 (K_d, C)."""
        return self.manifests[0].codebooks()

    def why_missing(self, image_id: str) -> str:
        """The reject of an image as the end of a sentence; empty if it was never tokenized."""
        for manifest in self.manifests:
            rejects = manifest.rejects()
            for reason, message in _rejects_of(rejects, image_id):
                return f", it was rejected as {reason} ({message})"
        return ""

    def _refuse_ambiguous(self) -> None:
        if len(self.manifests) == 1:
            return
        table = pa.table({"image_id": self.image_ids, "sha256": self.sha256})
        counts = table.group_by("image_id").aggregate([("sha256", "count_distinct")])
        twice = counts.filter(pc.greater(counts["sha256_count_distinct"], 1))
        if twice.num_rows:
            raise InputError(
                f"{twice.num_rows} image ids stand for different pictures in the manifests of a phase, e.g. "
                f"{twice['image_id'][0].as_py()}: give these pictures different paths and tokenize them again"
            )


def _rejects_of(rejects: pa.Table, image_id: str) -> list[tuple[str, str]]:
    chosen = rejects.filter(pc.equal(rejects["image_id"], image_id))
    return list(zip(chosen["reason"].to_pylist(), chosen["message"].to_pylist(), strict=True))


def _open_table(manifest: OpenManifest, rows: int) -> NDArray[np.integer[Any]]:
    """The flat copy of a manifest's codes, (rows, V*P*D), read-only."""
    spec = manifest.tokenizer
    dtype = code_dtype(spec.codebook_sizes).newbyteorder("<")
    width = manifest.manifest.totals.codes // rows if rows else spec.positions * spec.depth
    path = cache_dir() / "codes" / f"{manifest.digest}.{dtype.name}"
    wanted = rows * width * dtype.itemsize
    if wanted == 0:
        return np.empty((rows, width), dtype=dtype)
    if not _has_size(path, wanted):
        _make_table(manifest, path, wanted, width, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(rows, width))


def _has_size(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _make_table(manifest: OpenManifest, path: Path, size: int, width: int, dtype: np.dtype[Any]) -> None:
    """Copy the codes out of the shards into `path`; of a node's ranks one does it and the others wait."""
    with storage_errors("write", path):
        make_folder(path.parent)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _has_size(path, size):
                return
            log.info("copying %d MB of codes of %s to %s", size >> 20, manifest.folder, path)
            # One name for all attempts, so that a killed one leaves nothing that the next does not overwrite.
            unfinished = path.with_suffix(".unfinished")
            with unfinished.open("wb", buffering=_BUFFER_BYTES) as file:
                for shard, table in zip(manifest.shards, manifest.iter_shards(["codes"]), strict=True):
                    values, starts = list_values(table["codes"])
                    if (np.diff(starts) != width).any():
                        raise VerificationFailed(
                            f"{manifest.folder / shard.path} has rows that do not hold {width} codes: "
                            "run asvr verify on its folder"
                        )
                    file.write(np.ascontiguousarray(values, dtype=dtype).data)
                file.flush()
                os.fsync(file.fileno())
            if not _has_size(unfinished, size):
                raise VerificationFailed(
                    f"the shards in {manifest.folder} do not hold the codes that its index counts: run asvr verify on "
                    "that folder"
                )
            unfinished.replace(path)
