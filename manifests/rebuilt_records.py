"""Commit records written anew from what is left: a shard, and what a snapshot of the folder remembers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from manifests.commits import CommitRecord, MemberColumns, RejectRow, encode_usage
from manifests.cut import count_codes
from manifests.entries import read_entry
from manifests.errors import VerificationFailed
from manifests.id_index import IdIndex
from manifests.reader import OpenManifest
from manifests.schema import Manifest, Numerics, ShardEntry
from manifests.shard_reader import read_parquet
from manifests.shards import INDEX_SCHEMA, list_values, value_column
from manifests.storage import Store
from manifests.table_reader import RowStream

UNKNOWN = "unknown"
"""What a rebuilt record says of the device and the torch that made its codes, if there were several."""

UNKNOWN_ROW = -1
"""What a rebuilt record says of the row of the source that named an image."""

_FILE_COLUMNS = ["image_id", "source_size", "source_mtime_ns"]


class FileTimes:
    """Sizes and times of source files as the index of a snapshot has them, which is read once, a shard after the other."""

    def __init__(self, model: OpenManifest) -> None:
        schema = pa.schema([INDEX_SCHEMA.field(name) for name in _FILE_COLUMNS])
        self._shards = iter(model.shards)
        self._rows: RowStream | None
        try:
            self._rows = RowStream(model.iter_index(_FILE_COLUMNS), schema)
        except VerificationFailed:
            self._rows = None

    def of(self, shard: ShardEntry, image_ids: pa.ChunkedArray) -> pa.Table | None:
        """`source_size` and `source_mtime_ns` of a shard's rows, which are these images; None where the index does not say.

        Ask for shards in the order of the manifest's list.
        """
        if self._rows is None:
            return None
        try:
            for listed in self._shards:
                rows = self._rows.take(listed.rows)
                if listed == shard:
                    return rows if rows["image_id"].equals(image_ids) else None
        except VerificationFailed:
            self._rows = None
        return None


def record_of(
    store: Store, shard: ShardEntry, model: OpenManifest, files: FileTimes | None, *, lost: list[str]
) -> CommitRecord:
    """The record of a unit from its shard and, for sizes and times of files, from the index of the folder's snapshot."""
    manifest = model.manifest
    spec, column = manifest.producer, value_column(manifest.producer)
    table = read_parquet(pa.py_buffer(read_entry(store, shard, limit=shard.bytes)), store.where(shard.path))
    sizes, times = table["length"], pa.array(np.zeros(table.num_rows, np.int64))
    rows = files.of(shard, table["image_id"]) if files else None
    if rows is None:
        lost.append(f"the file times of unit {shard.unit}: the next job encodes its images again")
    else:
        sizes, times = rows["source_size"], rows["source_mtime_ns"]
    values, _ = list_values(table[column.kind])
    members = pa.table(
        {
            "image_id": table["image_id"],
            "size": sizes,
            "mtime_ns": times,
            "source_row": pa.array(np.full(table.num_rows, UNKNOWN_ROW)),
        }
    )
    usage = count_codes(values, spec.codebook_sizes) if spec.codebook_sizes else []
    return CommitRecord(
        fingerprint=manifest.fingerprint,
        unit=shard.unit,
        shard=shard,
        members=MemberColumns.of_table(members),
        rejects=[],
        usage=encode_usage(usage),
        views=len(list_values(table["view_boxes"])[0]) // 4,
        codes=values.size if spec.codebook_sizes else 0,
        numerics=_numerics(manifest),
        seconds=0,
    )


def lost_rejects(model: OpenManifest, records: Iterable[CommitRecord], taken: set[str]) -> CommitRecord | None:
    """A unit of the rejects that the snapshot knows and none of the records does, or None; its name is none of `taken`."""
    try:
        table = model.rejects()
    except VerificationFailed:
        return None
    index, lost = IdIndex(table["image_id"]), np.ones(table.num_rows, bool)
    for record in records:
        known = index.find(pa.chunked_array([record.members.image_id], pa.string()))
        lost[known[known >= 0]] = False
    table = table.filter(pa.array(lost))
    if not table.num_rows:
        return None
    unit = next(name for number in range(len(taken) + 1) if (name := f"u{number:06d}") not in taken)
    members = pa.table(
        {
            "image_id": table["image_id"],
            "size": table["source_size"],
            "mtime_ns": table["source_mtime_ns"],
            "source_row": table["source_row"],
        }
    )
    manifest = model.manifest
    return CommitRecord(
        fingerprint=manifest.fingerprint,
        unit=unit,
        shard=None,
        members=MemberColumns.of_table(members),
        rejects=[RejectRow(**row) for row in table.select(list(RejectRow.model_fields)).to_pylist()],
        usage=encode_usage([np.zeros(size, np.int64) for size in manifest.producer.codebook_sizes]),
        views=0,
        codes=0,
        numerics=_numerics(manifest),
        seconds=0,
    )


def _numerics(manifest: Manifest) -> Numerics:
    known = manifest.provenance.numerics
    if len(known) == 1:
        return known[0]
    return known[0].model_copy(update={"device": UNKNOWN, "torch": UNKNOWN})
