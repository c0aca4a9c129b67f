"""Cut a committed unit down to some of its images: rows are copied, nothing is encoded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.commit_record import CommitRecord, MemberColumns
from manifests.entries import read_entry
from manifests.schema import Producer, ShardEntry
from manifests.shard_reader import read_parquet
from manifests.shards import encode_rows, list_values, shard_name, value_column
from manifests.storage import Store
from manifests.usage import encode_usage


@dataclass(frozen=True)
class CutUnit:
    """A unit's new record, and the bytes of its new shard; `data` is None when no ok image is left."""

    record: CommitRecord
    data: bytes | None


def cut_unit(
    store: Store, record: CommitRecord, producer: Producer, keep: npt.NDArray[np.bool_], *, name: str | None = None
) -> CutUnit:
    """The unit of `record` in `store` with the members where `keep` is set, in their order; nothing is written.

    `name` renames it. `VerificationFailed` when the shard is not the one that the record names.
    """
    unit = name or record.unit
    members = record.members.table().filter(pa.array(keep))
    kept = members["image_id"]
    names = set(kept.to_pylist())
    rejects = [row for row in record.rejects if row.image_id in names]
    rows = _kept_rows(store, record, kept)
    shard, data, codes = None, None, 0
    usage = [np.zeros(size, np.int64) for size in producer.codebook_sizes]
    views = 0
    if rows is not None and rows.num_rows:
        column = value_column(producer)
        data = encode_rows(rows, column, fingerprint=record.fingerprint, unit=unit)
        shard = entry_of(unit, data, rows.num_rows)
        views = len(list_values(rows["view_boxes"])[0]) // 4
        if producer.codebook_sizes:
            values, _ = list_values(rows[column.kind])
            usage, codes = count_codes(values, producer.codebook_sizes), values.size
    return CutUnit(
        record.model_copy(
            update={
                "unit": unit,
                "shard": shard,
                "members": MemberColumns.of_table(members),
                "rejects": rejects,
                "usage": encode_usage(usage),
                "views": views,
                "codes": codes,
            }
        ),
        data,
    )


def entry_of(unit: str, data: bytes, rows: int) -> ShardEntry:
    """How a record names a shard with these bytes."""
    sha256 = hashlib.sha256(data).hexdigest()
    return ShardEntry(path=shard_name(unit, sha256), bytes=len(data), sha256=sha256, unit=unit, rows=rows)


def count_codes(values: npt.NDArray[Any], sizes: tuple[int, ...]) -> list[npt.NDArray[np.int64]]:
    """Histograms of D depths, (K_d,) each, of flat codes in which the depth runs fastest."""
    codes_ND = values.reshape(-1, len(sizes))
    return [np.bincount(codes_ND[:, depth], minlength=size) for depth, size in enumerate(sizes)]


def _kept_rows(store: Store, record: CommitRecord, kept: pa.ChunkedArray) -> pa.Table | None:
    if record.shard is None:
        return None
    data = read_entry(store, record.shard, limit=record.shard.bytes)
    table = read_parquet(pa.py_buffer(data), store.where(record.shard.path))
    return table.filter(pc.is_in(table["image_id"], value_set=kept)).combine_chunks()
