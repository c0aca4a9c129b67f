"""An inventory: each distinct image of a source once, with what tells a changed file from an unchanged one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from manifests.records import BadRecord
from manifests.schema import SourceIdentity
from tokenize_stage.retry import with_retries

INVENTORY_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),  # bytes; ABSENT when nothing can be found there
        pa.field("mtime_ns", pa.int64(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
    ]
)

ABSENT = -1

_ABSENT_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EINVAL}


@dataclass(frozen=True)
class Inventory:
    """What a source holds, in source order.

    `errors` are records or folders that name no usable image: they are counted apart from the images.
    """

    table: pa.Table
    errors: list[BadRecord]
    root: Path
    source: SourceIdentity

    @property
    def images(self) -> int:
        return int(self.table.num_rows)


def build_table(rows: Iterable[tuple[str, int, int, int]]) -> pa.Table:
    """A table of `INVENTORY_SCHEMA` from (image_id, size, mtime_ns, source_row) tuples."""
    names, *numbers = list(zip(*rows, strict=True)) or [(), (), (), ()]
    arrays = [_strings(names), *(_int64s(column) for column in numbers)]
    return pa.Table.from_arrays(arrays, schema=INVENTORY_SCHEMA)


def _strings(values: Sequence[str]) -> pa.Array:
    """Made from buffers: `pa.array` would import pandas where it is installed, a quarter of the time of a run with no work."""
    encoded = [value.encode("utf-8") for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.large_string(), len(encoded), buffers).cast(pa.string())


def _int64s(values: Sequence[int]) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.array(values, dtype=np.int64))])


def identity_of(path: str) -> tuple[int, int]:
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


def _stat_or_none(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116 - of millions of files, so no Path is made for each
    except OSError as error:
        if error.errno in _ABSENT_ERRORS:
            return None
        raise
