"""Index and rejects as Parquet, written as their rows come, so that no more than a row group of them is held."""

from __future__ import annotations

from types import TracebackType
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_ROWS = 1 << 20


class TableWriter:
    """Writes the columns of `schema` into an open file, in large row groups; the file is whole when the context ends."""

    def __init__(self, file: BinaryIO | pa.NativeFile, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(file, schema, compression="zstd", compression_level=3, write_page_checksum=True)
        self._schema = schema
        self._waiting = schema.empty_table()
        self.rows = 0

    def add(self, table: pa.Table) -> None:
        """Rows with the columns of the schema, perhaps among others, in any order."""
        self.rows += table.num_rows
        self._waiting = pa.concat_tables([self._waiting, table.select(self._schema.names).cast(self._schema)])
        while self._waiting.num_rows >= ROW_GROUP_ROWS:
            self._write_group()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and (self._waiting.num_rows or not self.rows):
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        self._writer.write_table(self._waiting.slice(0, ROW_GROUP_ROWS), row_group_size=ROW_GROUP_ROWS)
        self._waiting = self._waiting.slice(ROW_GROUP_ROWS)
