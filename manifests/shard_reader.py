"""Reading Parquet files of a token set: whole shards, parts of them, and side files that are in memory already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import StorageError, VerificationFailed
from manifests.storage import Store

UNREADABLE = (pa.ArrowException, OSError, ValueError)
"""What pyarrow raises for a damaged file; `ValueError` for names in the footer that are not UTF-8."""


def read_shard(store: Store, rel: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a shard (all columns, or some); a damaged or missing file is `VerificationFailed` naming it."""
    with open_shard(store, rel) as file:
        try:
            return _read(file, store.where(rel), columns)
        except UNREADABLE as error:
            raise store.fault(rel, error) or damaged(store.where(rel), error) from error


@contextmanager
def open_shard(store: Store, rel: str) -> Iterator[pq.ParquetFile]:
    """A shard with its footer read and page checksums on; a damaged or missing file is `VerificationFailed` naming it.

    What its methods raise is the caller's to translate: see `Store.fault`.
    """
    try:
        source = store.open_input(rel)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise damaged(store.where(rel), error.__cause__) from error
        raise
    with source:
        try:
            # Of an object store the pieces that are needed are fetched together, not one request for each column.
            file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=not store.is_local)
        except UNREADABLE as error:
            raise store.fault(rel, error) or damaged(store.where(rel), error) from error
        with file:
            yield file


def read_parquet(source: pa.Buffer, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole Parquet file in memory, page checksums verified; damage is `VerificationFailed` naming `name`."""
    with open_parquet(source, name) as file:
        try:
            return _read(file, name, columns)
        except UNREADABLE as error:
            raise damaged(name, error) from error


def _read(file: pq.ParquetFile, name: str, columns: Sequence[str] | None) -> pa.Table:
    table = file.read(columns=None if columns is None else list(columns))
    absent = set(columns or ()) - set(table.schema.names)  # pyarrow leaves out what it does not find
    if absent:
        raise damaged(name, ValueError(f"it lacks the columns {sorted(absent)}"))
    return table


def open_parquet(source: pa.Buffer, name: str) -> pq.ParquetFile:
    """A Parquet file in memory with its footer read and page checksums on; damage is `VerificationFailed` naming `name`."""
    try:
        return pq.ParquetFile(pa.BufferReader(source), page_checksum_verification=True)
    except UNREADABLE as error:
        raise damaged(name, error) from error


def damaged(name: str, error: Exception) -> VerificationFailed:
    """The error for a Parquet file that does not read."""
    reason = " ".join(str(error).split())[:200]
    return VerificationFailed(f"{name} is missing or damaged ({reason}): run asvr verify on its folder")
