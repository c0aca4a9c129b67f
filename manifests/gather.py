"""What the commit records of a set add up to: the rows of its index and rejects, written as they come, and its counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.commit_record import CommitRecord, commit_path, unit_order
from manifests.errors import FingerprintMismatch, VerificationFailed
from manifests.fingerprint import canonical_json
from manifests.parallel import ordered_map
from manifests.repeated_ids import RepeatedIds
from manifests.schema import ShardEntry
from manifests.shard_reader import read_shard
from manifests.shards import INDEX_SCHEMA, REJECTS_SCHEMA
from manifests.storage import Store
from manifests.table_writer import TableWriter
from manifests.usage import decode_usage

_THREADS = 8  # shards read at once: most of that is waiting where the store is far away


@dataclass(frozen=True)
class Part:
    """What one commit record adds to the manifest; `index` lacks the ordinal of the shard."""

    shard: ShardEntry | None
    index: pa.Table
    rejects: pa.Table


@dataclass
class Gathered:
    """The shards in unit order, and what is counted."""

    usage: list[npt.NDArray[np.uint64]]
    shards: list[ShardEntry] = field(default_factory=list)
    ids: RepeatedIds = field(default_factory=RepeatedIds)
    reasons: Counter[str] = field(default_factory=Counter)
    numerics: set[bytes] = field(default_factory=set)
    views: int = 0
    codes: int = 0


def gather(
    store: Store,
    records: Iterable[CommitRecord],
    mark: str,
    sizes: Sequence[int],
    index: TableWriter,
    rejects: TableWriter,
) -> Gathered:
    """Fold the records, which come in unit order, some at a time; their rows go to `index` and `rejects`."""
    total = Gathered(usage=[np.zeros(size, np.uint64) for size in sizes])
    parts = ordered_map(lambda record: (record, *_checked(store, record, mark, sizes)), records, threads=_THREADS)
    last = (0, "")
    for record, histograms, part in parts:
        if unit_order(record.unit) <= last:
            raise ValueError(f"unit {record.unit} comes after {last[1]}: the records are not in unit order")
        last = unit_order(record.unit)
        for sums, counts in zip(total.usage, histograms, strict=True):
            sums += counts
        if part.shard:
            ordinal = pa.array(np.full(part.index.num_rows, len(total.shards), np.int32))
            index.add(part.index.append_column("shard", ordinal))
            total.shards.append(part.shard)
            total.ids.add(part.index["image_id"])
        rejects.add(part.rejects)
        total.ids.add(part.rejects["image_id"])
        total.reasons.update(row.reason for row in record.rejects)
        for numerics in (record.numerics, *record.copied_numerics):
            total.numerics.add(canonical_json(numerics.model_dump(mode="json")))
        total.views += record.views
        total.codes += record.codes
    return total


def _checked(
    store: Store, record: CommitRecord, mark: str, sizes: Sequence[int]
) -> tuple[list[npt.NDArray[np.uint32]], Part]:
    """The histograms of a record and what it adds; its shard is read here."""
    where = store.where(commit_path(record.unit))
    if record.fingerprint != mark:
        raise FingerprintMismatch(
            f"{where} has fingerprint {record.fingerprint[:16]}, the job has {mark[:16]}: "
            "choose another output folder, or use --replace"
        )
    try:
        histograms = decode_usage(record.usage, sizes)
    except ValueError as error:
        raise VerificationFailed(f"{where} is damaged ({error}): delete it and run the job again") from error
    return histograms, _part(store, record)


def _part(store: Store, record: CommitRecord) -> Part:
    members = record.members.table().select(["image_id", "size", "mtime_ns"])
    members = members.rename_columns({"size": "source_size", "mtime_ns": "source_mtime_ns"})
    rejected = pa.array([row.image_id for row in record.rejects], pa.string())
    rejects = members.take(pc.index_in(rejected, value_set=members["image_id"]))
    for name, kind in (("reason", pa.string()), ("message", pa.string()), ("source_row", pa.int64())):
        rejects = rejects.append_column(name, pa.array([getattr(row, name) for row in record.rejects], kind))
    rejects = rejects.select(REJECTS_SCHEMA.names).cast(REJECTS_SCHEMA)
    kept = members.filter(pc.invert(pc.is_in(members["image_id"], value_set=rejected)))
    index = kept if record.shard is None else _index_of(store, record.shard, kept)
    return Part(record.shard, index, rejects)


def _index_of(store: Store, shard: ShardEntry, kept: pa.Table) -> pa.Table:
    """The index rows of a shard, all but its ordinal; the shard must hold the images that were kept, in order."""
    path = store.where(shard.path)
    advice = f"delete {commit_path(shard.unit)} and run the job again to make its unit anew"
    if store.size_if_there(shard.path) != shard.bytes:
        raise VerificationFailed(f"{path} is missing or does not have its {shard.bytes} bytes: {advice}")
    rows = read_shard(store, shard.path, ["image_id", "sha256", "width", "height"])
    if not rows["image_id"].equals(kept["image_id"]):
        raise VerificationFailed(f"{path} does not hold the images of its commit record: {advice}")
    rows = rows.replace_schema_metadata(None)
    rows = rows.append_column("row", pa.array(np.arange(rows.num_rows, dtype=np.int32)))
    for name in ("source_size", "source_mtime_ns"):
        rows = rows.append_column(name, kept[name])
    return rows.cast(pa.schema([INDEX_SCHEMA.field(name) for name in rows.schema.names]))
