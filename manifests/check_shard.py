"""Everything that can be wrong with one shard, of which only some row groups are held at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from manifests.check_rows import RowCheck
from manifests.entries import shard_problem
from manifests.errors import StorageError, VerificationFailed
from manifests.report import Problem
from manifests.schema import Manifest, ShardEntry
from manifests.shard_reader import UNREADABLE, damaged, open_parquet, open_shard
from manifests.shards import made_as, shard_mark, shard_schema, value_column
from manifests.storage import Store
from manifests.versions import READABLE_SHARDS

_LARGEST_SHARD = 1 << 33  # the int32 values of the longest list that Arrow offsets can reach
_LARGEST_HELD = 64 << 20
_READ_AT_ONCE = 8 << 20  # bytes of values, decoded


@dataclass
class ShardFindings:
    """What a shard holds and what is wrong with it; `rows` is None when it could not be read.

    `histograms`: how often each code occurs, D arrays (K_d,); empty when the rows have wrong lengths.
    """

    problems: list[Problem] = field(default_factory=list)
    rows: pa.Table | None = None
    histograms: list[npt.NDArray[np.int64]] = field(default_factory=list)
    views: int = 0
    codes: int = 0


def check_shard(store: Store, shard: ShardEntry, manifest: Manifest, *, size: int | None, deep: bool) -> ShardFindings:
    """Check size (`size` is what the store says), footer and schema of a shard and, when `deep`, its bytes and every row."""
    found = ShardFindings()

    def report(code: str, message: str) -> None:
        found.problems.append(Problem(code, shard.path, message))

    if problem := shard_problem(store, shard, size):
        found.problems.append(problem)
        return found
    path = store.where(shard.path)
    try:
        # From a network a shard comes once, and is held; on a disk it is read twice, the second time most likely from memory.
        data = store.read(shard.path) if deep and not store.is_local and shard.bytes <= _LARGEST_HELD else None
        if deep and _sha256(store, shard, data) != shard.sha256:
            report("shard_sha256", f"{path} is damaged (another sha256): delete it and run the tokenize job again")
            return found  # whatever else it says is not worth believing, nor safe to parse
        opened = open_shard(store, shard.path) if data is None else open_parquet(pa.py_buffer(data), path)
        with opened as file:
            readable = _check_footer(file, shard, manifest, report)
            if deep and readable:
                _check_rows(file, store, shard, manifest, found)
    except VerificationFailed as error:
        report("shard_schema", str(error))
    except StorageError as error:
        if not store.is_local:
            raise  # the network or the rights are at fault, and every other shard would say the same
        report("shard_missing", str(error))
    return found


def _sha256(store: Store, shard: ShardEntry, data: bytes | None) -> str:
    return store.sha256(shard.path, shard.bytes) if data is None else hashlib.sha256(data).hexdigest()


def _check_footer(
    file: pq.ParquetFile, shard: ShardEntry, manifest: Manifest, report: Callable[[str, str], None]
) -> bool:
    """Whether the rows can be read as a shard's."""
    schema = file.schema_arrow
    column = value_column(manifest.producer)
    wanted = shard_schema(column)
    wrong = [field.name for field in wanted if not _has(schema, field)]
    if wrong:
        report("shard_schema", f"{shard.path} lacks these columns or has them with another type: {', '.join(wrong)}")
    marks = {
        **{name.removeprefix("asvr."): (value, "shard_schema") for name, value in column.marks.items()},
        "fingerprint": (manifest.fingerprint, "fingerprint_mismatch"),
    }
    for name, (value, code) in marks.items():
        mark = shard_mark(schema, name)
        if mark != value:
            report(code, f"{shard.path} has {name} {mark!r}, its manifest says {value!r}")
    version, unit = shard_mark(schema, "schema_version"), shard_mark(schema, "unit")
    if version not in READABLE_SHARDS:
        report(
            "shard_schema", f"{shard.path} has schema_version {version!r}, which this asvr does not read: update asvr"
        )
    if not made_as(unit, shard.unit):
        report("shard_schema", f"{shard.path} has unit {unit!r}, its manifest says {shard.unit!r}")
    rows = file.metadata.num_rows
    if rows != shard.rows:
        report("shard_rows", f"{shard.path} has {rows} rows, its manifest says {shard.rows}")
    unpacked = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
    if unpacked > _LARGEST_SHARD:
        report("shard_schema", f"{shard.path} unpacks to {unpacked} bytes, more than a shard can hold")
    return not wrong and unpacked <= _LARGEST_SHARD


def _has(schema: pa.Schema, field: pa.Field) -> bool:
    at = schema.get_all_field_indices(field.name)
    return len(at) == 1 and bool(schema.field(at[0]).equals(field))


def _check_rows(
    file: pq.ParquetFile, store: Store, shard: ShardEntry, manifest: Manifest, found: ShardFindings
) -> None:
    check = RowCheck(manifest.producer, manifest.kind)
    for table in _read(file, store, shard, check.columns):
        check.add(table)
    found.problems.extend(Problem(code, shard.path, message) for code, message in check.problems())
    found.rows = check.identities
    found.histograms, found.views, found.codes = check.histograms, check.views, check.codes


def _read(file: pq.ParquetFile, store: Store, shard: ShardEntry, columns: list[str]) -> Iterator[pa.Table]:
    try:
        for groups in _portions(file.metadata):
            yield file.read_row_groups(groups, columns=columns)
    except UNREADABLE as error:
        raise store.fault(shard.path, error) or damaged(store.where(shard.path), error) from error


def _portions(metadata: pq.FileMetaData) -> Iterator[list[int]]:
    """The row groups to read at once: as many as unpack to `_READ_AT_ONCE` bytes, at least one."""
    groups: list[int] = []
    size = 0
    for group in range(metadata.num_row_groups):
        more = metadata.row_group(group).total_byte_size
        if groups and size + more > _READ_AT_ONCE:
            yield groups
            groups, size = [], 0
        groups.append(group)
        size += more
    yield groups
