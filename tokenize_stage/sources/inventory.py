"""An inventory: each distinct image of a source once, with what tells a changed file from an unchanged one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.images import ImageSource
from manifests.records import BadRecord
from manifests.schema import SourceIdentity
from tokenize_stage.retry import with_retries

FILE_TYPE = pa.dictionary(pa.int32(), pa.string())

INVENTORY_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),  # bytes; ABSENT when nothing can be found there
        pa.field("mtime_ns", pa.int64(), nullable=False),  # of the file, or of the container that the image is in
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("file", FILE_TYPE),  # the container below the root; null: a file of its own, named by image_id
        pa.field("offset", pa.int64(), nullable=False),  # what `manifests.images` makes of it depends on the container
    ]
)

ABSENT = -1

CHUNK_ROWS = 1 << 16
"""Rows that are held as Python objects at once; also a chunk of an inventory's columns."""

_ABSENT_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EINVAL}

Identity = tuple[int, int]
"""(size, mtime_ns) of a file: what tells a changed one from an unchanged one."""


class Container(NamedTuple):
    """A tar or Parquet file as it was read: `rows` rows of the inventory, which stand together, are in it.

    `carried` names the types of a Parquet file's carried columns, in the order of the configuration.
    """

    file: str
    size: int
    mtime_ns: int
    rows: int
    errors: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()


class KnownContainers(Protocol):
    """What the last inventory of the source knew of its containers."""

    def rows(self, file: str, size: int, mtime_ns: int) -> tuple[pa.Table, Container] | None:
        """A container that is what it was, and its rows; None for a new or changed one: it is to be read."""


@dataclass(frozen=True)
class Inventory:
    """What a source holds, in source order.

    `table` has the columns of `INVENTORY_SCHEMA`, after which a source may put its own (see `manifests.images`).
    `errors` are records, folders or containers that name no usable image: they are counted apart from the images.
    `containers` are those of the images, in source order; empty where each image is a file of its own.
    """

    table: pa.Table
    errors: list[BadRecord]
    images_at: ImageSource
    source: SourceIdentity
    containers: tuple[Container, ...] = ()

    @property
    def images(self) -> int:
        return int(self.table.num_rows)

    @property
    def root(self) -> str:
        """Where the images lie, for people."""
        return self.images_at.root


def build_table(rows: Iterable[tuple[str, int, int, int]]) -> pa.Table:
    """A table of `INVENTORY_SCHEMA` from (image_id, size, mtime_ns, source_row) tuples of images in files of their own."""
    chunks = [_own_files(chunk) for chunk in _in_chunks(iter(rows))]
    return pa.concat_tables(chunks) if chunks else INVENTORY_SCHEMA.empty_table()


def container_rows(
    file: str,
    ids: Sequence[str],
    *,
    size: npt.ArrayLike,
    mtime_ns: int,
    source_row: npt.ArrayLike,
    offset: npt.ArrayLike,
    own: Mapping[str, npt.ArrayLike] | None = None,
) -> pa.Table:
    """The rows of one container. One number for a column holds for all of them; `own` are further int64 columns."""
    count = len(ids)
    file_column = pa.DictionaryArray.from_arrays(_numbers(0, count).cast(pa.int32()), text_array([file]))
    table = pa.Table.from_arrays(
        [
            text_array(ids),
            *(_numbers(values, count) for values in (size, mtime_ns, source_row)),
            file_column,
            _numbers(offset, count),
        ],
        schema=INVENTORY_SCHEMA,
    )
    for name, values in (own or {}).items():
        table = table.append_column(name, _numbers(values, count))
    return table


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of containers one after the other, their source rows counted through."""
    filled = [table for table in tables if table.num_rows]
    if not filled:
        return INVENTORY_SCHEMA.empty_table()
    ends = np.cumsum([table.num_rows for table in filled])
    at = INVENTORY_SCHEMA.get_field_index("source_row")
    field = INVENTORY_SCHEMA.field(at)
    numbered = [
        table.set_column(at, field, _numbers(np.arange(end - table.num_rows, end), table.num_rows))
        for table, end in zip(filled, ends, strict=True)
    ]
    return pa.concat_tables(numbered)


def text_array(values: Sequence[str]) -> pa.Array:
    """Made from buffers: `pa.array` would import pandas where it is installed, a quarter of the time of a run with no work."""
    encoded = [value.encode("utf-8") for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.large_string(), len(encoded), buffers).cast(pa.string())


def identity_of(path: str) -> Identity:
    """(size, mtime_ns) of a file, or (ABSENT, 0): whether that is a reject is decided when the file is read.

    Raises `StorageError` when the storage itself keeps failing.
    """
    try:
        stat = with_retries(lambda: _stat_or_none(path), f"looking at {path}")
    except ValueError:  # a NUL byte in the name: no such file can exist
        return ABSENT, 0
    return (ABSENT, 0) if stat is None else (stat.st_size, stat.st_mtime_ns)


def is_text(name: str) -> bool:
    """Whether a name can be stored: names with undecodable bytes or lone surrogates cannot."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _own_files(rows: list[tuple[str, int, int, int]]) -> pa.Table:
    names, *numbers = list(zip(*rows, strict=True))
    columns = (_numbers(column, len(rows)) for column in numbers)
    arrays = [text_array(names), *columns, pa.nulls(len(rows), FILE_TYPE), _numbers(0, len(rows))]
    return pa.Table.from_arrays(arrays, schema=INVENTORY_SCHEMA)


def _in_chunks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


def _numbers(values: npt.ArrayLike, count: int) -> pa.Array:
    column = np.ascontiguousarray(np.broadcast_to(np.asarray(values, dtype=np.int64), count))
    return pa.Array.from_buffers(pa.int64(), count, [None, pa.py_buffer(column)])


def _stat_or_none(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116 - of millions of files, so no Path is made for each
    except OSError as error:
        if error.errno in _ABSENT_ERRORS:
            return None
        raise
