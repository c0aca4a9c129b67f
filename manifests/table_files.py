"""Parquet and Arrow files as rows that are read from a place on, in bounded memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifests.storage import Store

ARROW_SUFFIX = ".arrow"

_BATCH_ROWS = 64  # a row may be a picture of megabytes
_BUFFER_BYTES = 2**20


class TableFile(ABC):
    """An open file. Its methods raise what pyarrow raises, `OSError` or `pa.ArrowException`."""

    rows: int
    schema: pa.Schema

    @abstractmethod
    def group_end(self, row: int) -> int:
        """The first row after the row group that `row` is in."""

    @abstractmethod
    def batches(self, row: int, columns: Sequence[str]) -> tuple[int, Iterator[pa.RecordBatch]]:
        """The batches of the row group that `row` is in, and the number of the first row of the first one."""

    @abstractmethod
    def read(self, columns: Sequence[str]) -> pa.Table:
        """All rows of some columns."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Some rows, ascending, of some columns."""
        parts: list[pa.Table] = []
        at = 0
        while at < len(rows):
            group_end = self.group_end(rows[at])
            start, batches = self.batches(rows[at], columns)
            for batch in batches:
                stop = at + int(np.searchsorted(rows[at:], start + batch.num_rows))
                parts.append(pa.Table.from_batches([batch]).take(np.asarray(rows[at:stop], np.int64) - start))
                at, start = stop, start + batch.num_rows
                if at == len(rows) or rows[at] >= group_end:
                    break
        empty = pa.schema([self.schema.field(name) for name in columns]).empty_table()
        return pa.concat_tables(parts).combine_chunks() if parts else empty


class ParquetTable(TableFile):
    """A Parquet file. Only the pages that are needed of the row groups that are needed are held."""

    def __init__(self, store: Store, rel: str) -> None:
        self._input = store.open_input(rel)
        try:
            self._file = pq.ParquetFile(self._input, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except BaseException:
            self._input.close()
            raise
        metadata = self._file.metadata
        self.rows = metadata.num_rows
        self.schema = self._file.schema_arrow
        self._ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])

    def group_end(self, row: int) -> int:
        return int(self._ends[self._group(row)])

    def batches(self, row: int, columns: Sequence[str]) -> tuple[int, Iterator[pa.RecordBatch]]:
        group = self._group(row)
        first = int(self._ends[group - 1]) if group else 0
        return first, self._file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(columns), use_threads=False)

    def read(self, columns: Sequence[str]) -> pa.Table:
        return self._file.read(list(columns), use_threads=False)

    def close(self) -> None:
        self._file.close()
        self._input.close()

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))


class ArrowTable(TableFile):
    """An Arrow stream or file, as `save_to_disk` of Hugging Face `datasets` writes it; one row group for our purposes.

    On a disk it is mapped, so that skipped pictures are not read.
    """

    def __init__(self, store: Store, rel: str) -> None:
        self._input = pa.memory_map(store.where(rel)) if store.is_local else store.open_input(rel)
        try:
            self._is_file = self._input.read_at(6, 0) == b"ARROW1"
            reader = self._open()
            self.schema = reader.schema
            self.rows = sum(batch.num_rows for batch in self._read())
        except BaseException:
            self._input.close()
            raise

    def group_end(self, row: int) -> int:  # noqa: ARG002 - there is but one
        return self.rows

    def batches(self, row: int, columns: Sequence[str]) -> tuple[int, Iterator[pa.RecordBatch]]:  # noqa: ARG002
        return 0, (batch.select(list(columns)) for batch in self._read())

    def read(self, columns: Sequence[str]) -> pa.Table:
        schema = pa.schema([self.schema.field(name) for name in columns])
        return pa.Table.from_batches([batch.select(list(columns)) for batch in self._read()], schema)

    def close(self) -> None:
        self._input.close()

    def _read(self) -> Iterator[pa.RecordBatch]:
        reader = self._open()
        if self._is_file:
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from reader

    def _open(self) -> pa.RecordBatchReader | pa.RecordBatchFileReader:
        self._input.seek(0, os.SEEK_SET)
        return pa.ipc.open_file(self._input) if self._is_file else pa.ipc.open_stream(self._input)


def open_table(store: Store, rel: str) -> TableFile:
    """A `.parquet` or `.arrow` file; raises what pyarrow raises, or `StorageError`, when it cannot be opened."""
    return ArrowTable(store, rel) if rel.lower().endswith(ARROW_SUFFIX) else ParquetTable(store, rel)
