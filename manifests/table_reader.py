"""Index and rejects read by pieces: what `manifests.table_writer` wrote, however many images there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.entries import check_entry
from manifests.errors import VerificationFailed
from manifests.report import Problem
from manifests.schema import TableEntry
from manifests.shard_reader import UNREADABLE, damaged, open_shard
from manifests.storage import Store

BATCH_ROWS = 64 << 10


def iter_rows(store: Store, rel: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a table in batches, in its order; damage is `VerificationFailed` naming the file."""
    with open_shard(store, rel) as file:
        try:
            # One row group at a time: of an object store, all that is asked for at once is fetched at once.
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns)):
                    if set(columns) - set(batch.schema.names):
                        raise damaged(store.where(rel), ValueError(f"it lacks some of {sorted(columns)}"))
                    yield batch.select(list(columns))
        except UNREADABLE as error:
            raise store.fault(rel, error) or damaged(store.where(rel), error) from error


def rows_at(batches: Iterable[pa.RecordBatch], places: npt.NDArray[np.int64], schema: pa.Schema) -> pa.Table:
    """The rows of a table at some places, which ascend, from one pass over its batches."""
    found, start = [], 0
    for batch in batches:
        first, end = np.searchsorted(places, [start, start + len(batch)])
        if end > first:
            found.append(batch.take(pa.array(places[first:end] - start)))
        start += len(batch)
    return pa.Table.from_batches(found, schema)


def table_problem(store: Store, name: str, entry: TableEntry, schema: pa.Schema) -> Problem | None:
    """What is wrong with the file of an index or rejects (`name`) by itself; None if `iter_rows` will read all of it."""
    absent = not store.exists(entry.path)
    try:
        check_entry(store, entry)
    except VerificationFailed as error:
        return Problem(f"{name}_{'missing' if absent else 'sha256'}", entry.path, str(error))
    code = f"{name}_mismatch"
    try:
        with open_shard(store, entry.path) as file:
            same = file.schema_arrow.equals(schema) and file.metadata.num_rows == entry.rows
        if not same or sum(batch.num_rows for batch in iter_rows(store, entry.path, schema.names)) != entry.rows:
            message = f"{entry.path} does not have the columns of an {name} file and {entry.rows} rows"
            return Problem(code, entry.path, message)
    except VerificationFailed as error:
        return Problem(code, entry.path, str(error))
    return None


class RowStream:
    """The rows of a table, taken in order, as many at a time as one likes."""

    def __init__(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> None:
        self._batches = batches
        self._rest: pa.RecordBatch | None = next(batches, None)
        self._schema = schema

    def take(self, count: int) -> pa.Table:
        """The next `count` rows, fewer where the table ends."""
        parts = []
        while count and self._rest is not None:
            parts.append(self._rest.slice(0, count))
            count -= len(parts[-1])
            more = len(self._rest) - len(parts[-1])
            self._rest = self._rest.slice(len(parts[-1])) if more else next(self._batches, None)
        return pa.Table.from_batches(parts, self._schema)
