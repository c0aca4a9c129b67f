"""Shards: the Parquet files that hold codes or features, and the Parquet side files (index, rejects) beside the manifest.

Plain Arrow types only, so pyarrow, pandas and DuckDB read them without this package. Measured on random 14-bit
codes: byte-stream-split + zstd-1 gives 1.77 bytes a code, plain + zstd 2.38, and row groups of 64 to 128 rows
keep one random row at about 4 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifests.columns import ROW_GROUP_ROWS, ValueColumn, code_column, code_dtype, feature_column, value_column
from manifests.schema import SCHEMA_VERSION, FeatureDtype
from manifests.table_writer import TableWriter

__all__ = [
    "INDEX_SCHEMA",
    "REJECTS_SCHEMA",
    "ROW_GROUP_ROWS",
    "Locator",
    "ShardData",
    "ValueColumn",
    "code_dtype",
    "encode_index",
    "encode_rejects",
    "encode_rows",
    "encode_shard",
    "list_values",
    "made_as",
    "shard_mark",
    "shard_name",
    "shard_schema",
    "value_column",
]

_LARGEST_LIST = 2**31 - 1  # Arrow's list offsets are int32


class Locator(NamedTuple):
    """Where the encoded bytes of an image are: `length` bytes at `offset` of `file`, relative to the source root."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class ShardData:
    """The rows of one shard as columns, N images in source order.

    `view_boxes`: (N, V, 4) or one (V, 4) per image, float32, x0 y0 x1 y1 in pixels of the oriented source.
    `codes`: (N, L) or one (L,) per image, integers, row-major over view, position, depth; or features as stored
    (bfloat16 as uint16 bits), row-major over view, position, width.
    `extra`: N rows of source columns to carry along, or None.
    """

    image_ids: Sequence[str]
    sha256: Sequence[str]
    widths: npt.ArrayLike
    heights: npt.ArrayLike
    view_boxes: npt.NDArray[np.float32] | Sequence[npt.NDArray[np.float32]]
    locators: Sequence[Locator]
    codes: npt.NDArray[Any] | Sequence[npt.NDArray[Any]]
    extra: pa.Table | None = None


def shard_schema(codes: np.dtype[Any] | ValueColumn) -> pa.Schema:
    """The columns of every shard; source columns that are carried along come after them.

    `codes`: the type of the codes, or the column of another kind of shard.
    """
    column = codes if isinstance(codes, ValueColumn) else code_column(codes)
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("view_boxes", _list_of(pa.float32()), nullable=False),
            pa.field("file", pa.string(), nullable=False),
            pa.field("offset", pa.int64(), nullable=False),
            pa.field("length", pa.int64(), nullable=False),
            column.field,
        ]
    )


def _list_of(item: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", item, nullable=False))


INDEX_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),  # ordinal in the manifest's list of shards
        pa.field("row", pa.int32(), nullable=False),
        pa.field("source_size", pa.int64(), nullable=False),
        pa.field("source_mtime_ns", pa.int64(), nullable=False),
    ]
)

REJECTS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("source_size", pa.int64(), nullable=False),
        pa.field("source_mtime_ns", pa.int64(), nullable=False),
    ]
)


def encode_shard(
    data: ShardData,
    *,
    fingerprint: str,
    unit: str,
    code_dtype: np.dtype[Any] | type[np.unsignedinteger[Any]] = np.uint16,
    feature_dtype: FeatureDtype | None = None,
) -> bytes:
    """The Parquet bytes of a shard, of codes or, with `feature_dtype`, of features.

    The same input gives the same bytes with the same pyarrow. Raises `ValueError` when columns disagree in length, a
    code does not fit `code_dtype`, or features are not stored as `feature_dtype`.
    """
    column = feature_column(feature_dtype) if feature_dtype else code_column(code_dtype)
    schema = shard_schema(column)
    if feature_dtype and (other := {str(row.dtype) for row in data.codes} - {str(column.dtype)}):
        raise ValueError(f"{feature_dtype} features are stored as {column.dtype}, not {', '.join(sorted(other))}")
    locators = list(data.locators)
    columns: list[Any] = [
        pa.array(data.image_ids, pa.string()),
        pa.array(data.sha256, pa.string()),
        pa.array(np.asarray(data.widths, np.int32)),
        pa.array(np.asarray(data.heights, np.int32)),
        _list_column(data.view_boxes, np.dtype(np.float32)),
        pa.array([locator.file for locator in locators], pa.string()),
        pa.array(np.fromiter((locator.offset for locator in locators), np.int64, len(locators))),
        pa.array(np.fromiter((locator.length for locator in locators), np.int64, len(locators))),
        _list_column(data.codes, column.dtype),
    ]
    extra = pa.table({}) if data.extra is None else data.extra
    lengths = {name: len(column) for name, column in zip(schema.names, columns, strict=True)}
    lengths |= dict.fromkeys(extra.schema.names, extra.num_rows)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of unit {unit} differ in length: {lengths}")
    if clash := set(extra.schema.names) & set(schema.names):
        raise ValueError(f"unit {unit} carries source columns with names of the shard's own: {sorted(clash)}")
    table = pa.Table.from_arrays([*columns, *extra.columns], schema=pa.schema([*schema, *extra.schema]))
    return encode_rows(table, column, fingerprint=fingerprint, unit=unit)


def encode_rows(table: pa.Table, column: ValueColumn, *, fingerprint: str, unit: str) -> bytes:
    """The Parquet bytes of a shard from its columns as Arrow has them: those of `shard_schema`, then carried ones."""
    carried = table.schema.names[len(shard_schema(column)) :]
    longest = pc.max(pc.list_value_length(table[column.kind])).as_py() or 0
    table = table.replace_schema_metadata(
        {
            "asvr.schema_version": str(SCHEMA_VERSION),
            "asvr.fingerprint": fingerprint,
            "asvr.unit": unit,
            **column.marks,
        }
    )
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=["file", *carried],
        column_encoding={column.leaf: "BYTE_STREAM_SPLIT"},
        write_statistics=["image_id", "width", "height"],
        write_page_checksum=True,
    ) as writer:
        writer.write_table(table, row_group_size=column.group_rows(longest))
    return bytes(sink.getvalue())


def shard_name(unit: str, sha256: str) -> str:
    """The path of a shard below the output folder: named by content, so a rewrite never touches what is committed."""
    return f"shards/{unit}-{sha256[:16]}.parquet"


def shard_mark(schema: pa.Schema, name: str) -> str:
    """What a shard's metadata says of its `schema_version`, `fingerprint`, `unit`, `kind` or `dtype`; else nothing."""
    return str((schema.metadata or {}).get(f"asvr.{name}".encode(), b"").decode(errors="replace"))


def made_as(mark: str, unit: str) -> bool:
    """Whether a shard that says it is of unit `mark` can be that of `unit`.

    In a merged set the unit `u000003` of the second set is called `1.u000003`, and its shard is the very file it was.
    """
    return bool(mark) and (unit == mark or unit.endswith(f".{mark}"))


def encode_index(table: pa.Table) -> bytes:
    """The Parquet bytes of an index with the columns of `INDEX_SCHEMA`, in large row groups."""
    return _encode_table(table, INDEX_SCHEMA)


def encode_rejects(table: pa.Table) -> bytes:
    """The Parquet bytes of a rejects file with the columns of `REJECTS_SCHEMA`."""
    return _encode_table(table, REJECTS_SCHEMA)


def list_values(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """A list column as flat values and N + 1 offsets into them; one chunk costs no copy of the values."""
    chunks = column.chunks
    values = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks]
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
    offsets = np.zeros(len(column) + 1, np.int64)
    if chunks:
        np.cumsum(np.concatenate(lengths), out=offsets[1:])
        return (values[0] if len(values) == 1 else np.concatenate(values)), offsets
    return np.empty(0, column.type.value_type.to_pandas_dtype()), offsets


def _list_column(rows: Any, dtype: np.dtype[Any]) -> pa.ListArray:
    """Rows of any shape as a list column, each row flattened; an array of the right dtype is not copied."""
    if isinstance(rows, np.ndarray):
        lengths = np.full(len(rows), rows[0].size if len(rows) else 0, np.int64)
        flat = rows.reshape(-1)
    else:
        lengths = np.fromiter((row.size for row in rows), np.int64, len(rows))
        flat = np.concatenate([row.reshape(-1) for row in rows]) if len(rows) else np.empty(0, dtype)
    if flat.size > _LARGEST_LIST:
        raise ValueError(f"{flat.size} list items do not fit one shard: make unit_size smaller")
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    if np.issubdtype(dtype, np.integer) and flat.size and flat.dtype != dtype:
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high > np.iinfo(dtype).max:
            raise ValueError(f"codes from {low} to {high} do not fit {dtype}")
    values = pa.array(np.ascontiguousarray(flat, dtype))
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=_list_of(values.type))


def _encode_table(table: pa.Table, schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    with TableWriter(sink, schema) as writer:
        writer.add(table)
    return bytes(sink.getvalue())
