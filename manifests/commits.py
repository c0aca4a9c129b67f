"""The commit protocol on disk: units are committed one by one, then the manifest is assembled from their records.

OUTPUT/ manifest.json, snapshots/DIGEST16.json, shards/UNIT-SHA16.parquet, index-SHA16.parquet,
rejects-SHA16.parquet, codebook-SHA16.safetensors, commits/UNIT.json.zst. A record is written after its shard
and before the manifest that names it, by the one driver that holds the lease; resuming is a set difference
over the records. Whatever no manifest names does not exist for a reader.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import zstandard
from pydantic import ValidationError

from manifests.codebook import encode_codebooks
from manifests.commit_record import CommitRecord, MemberColumns, RejectRow, UnitMember
from manifests.documents import compress, decompress, first_problem
from manifests.errors import FingerprintMismatch, VerificationFailed
from manifests.fingerprint import canonical_json, fingerprint
from manifests.schema import (
    MANIFEST_NAME,
    FileEntry,
    Geometry,
    Manifest,
    Producer,
    Provenance,
    ShardEntry,
    SourceIdentity,
    TableEntry,
    TokenizerSpec,
    Totals,
)
from manifests.shards import INDEX_SCHEMA, REJECTS_SCHEMA, encode_index, encode_rejects, read_shard
from manifests.storage import Store
from manifests.usage import decode_usage, depth_usage, encode_usage

__all__ = [
    "CommitRecord",
    "ManifestHeader",
    "MemberColumns",
    "RejectRow",
    "UnitMember",
    "assemble_manifest",
    "commit_path",
    "decode_usage",
    "depth_usage",
    "encode_usage",
    "list_commits",
    "read_commit",
    "write_commit",
]

INLINE_SHARDS = 10_000
"""Up to here the manifest lists its shards itself; longer lists go to a zstd side file."""

_COMMITS = "commits/"
_SUFFIX = ".json.zst"
_LARGEST_RECORD = 1 << 30


def write_commit(store: Store, record: CommitRecord) -> None:
    """Commit a unit: from here on its shard is part of the set. Hold the lease."""
    store.write(commit_path(record.unit), compress(record.model_dump_json().encode()))


def read_commit(store: Store, unit: str) -> CommitRecord:
    """The record of a committed unit; a damaged or missing one is `VerificationFailed` naming its file."""
    path = commit_path(unit)
    where = store.path(path)
    if not store.exists(path):
        raise VerificationFailed(f"{where} is missing: run the tokenize stage again to make its unit")
    try:
        record = CommitRecord.model_validate_json(decompress(store.read(path), limit=_LARGEST_RECORD))
        if record.unit != unit:
            raise ValueError(f"it is the record of unit {record.unit}")
    except (zstandard.ZstdError, ValueError) as error:
        reason = first_problem(error)
        raise VerificationFailed(
            f"{where} is damaged ({reason}): delete it and run the tokenize stage again to make its unit anew"
        ) from error
    return record


def list_commits(store: Store) -> list[str]:
    """The committed units, in unit order."""
    names = [path[len(_COMMITS) : -len(_SUFFIX)] for path in store.list(_COMMITS) if path.endswith(_SUFFIX)]
    return sorted((name for name in names if "/" not in name), key=unit_order)


def commit_path(unit: str) -> str:
    """The path of a unit's record below the output folder."""
    return f"{_COMMITS}{unit}{_SUFFIX}"


def unit_order(unit: str) -> tuple[int, str]:
    """Sort key of units: `u1000000` comes after `u999999`."""
    return len(unit), unit


@dataclass(frozen=True)
class ManifestHeader:
    """What a manifest says beside its commits; the fingerprint is that of `fingerprint_keys`.

    `codebooks` is empty where `tokenizer` makes features.
    """

    fingerprint_keys: dict[str, Any]
    tokenizer: Producer
    geometry: Geometry
    codebooks: Sequence[npt.NDArray[np.float32]]
    source: SourceIdentity
    source_errors: int
    command: list[str]
    versions: dict[str, str]


def assemble_manifest(store: Store, header: ManifestHeader, records: Iterable[CommitRecord]) -> Manifest:
    """Write index, rejects, codebook, snapshot and, last, `manifest.json`; return the manifest. Hold the lease.

    The records may come in any order. The same content gives the same bytes except the provenance, and when
    only that would change, the manifest on disk stays and no snapshot is added. Raises `FingerprintMismatch`
    for a record of another fingerprint and `VerificationFailed` for a shard that does not match its record or
    an image_id that two units share.
    """
    mark = fingerprint(header.fingerprint_keys)
    gathered = _gather(store, records, mark, header.tokenizer.codebook_sizes)
    shards, index, rejects = gathered.shards(), gathered.index(), gathered.rejects()
    _refuse_duplicates(store, pa.chunked_array(index["image_id"].chunks + rejects["image_id"].chunks, pa.string()))
    shards_file = None
    if len(shards) > INLINE_SHARDS:
        listing = json.dumps([shard.model_dump() for shard in shards], separators=(",", ":"))
        shards_file = FileEntry(**_put(store, "shards-{}.json.zst", compress(listing.encode())))
    manifest = Manifest(
        **_kind_keys(store, header, gathered.usage),
        fingerprint=mark,
        fingerprint_keys=header.fingerprint_keys,
        geometry=header.geometry,
        source=header.source,
        shards=[] if shards_file else shards,
        shards_file=shards_file,
        index=TableEntry(**_put(store, "index-{}.parquet", encode_index(index)), rows=index.num_rows),
        rejects=TableEntry(**_put(store, "rejects-{}.parquet", encode_rejects(rejects)), rows=rejects.num_rows),
        totals=Totals(
            images=index.num_rows + rejects.num_rows,
            ok=index.num_rows,
            rejected=rejects.num_rows,
            source_errors=header.source_errors,
            rejected_by_reason=dict(sorted(gathered.reasons.items())),
            views=gathered.views,
            codes=gathered.codes,
        ),
        provenance=Provenance(
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            command=header.command,
            versions=header.versions,
            numerics=[json.loads(text) for text in sorted(gathered.numerics)],
        ),
    )
    return _publish(store, manifest)


def _kind_keys(store: Store, header: ManifestHeader, usage: Sequence[npt.NDArray[np.uint64]]) -> dict[str, Any]:
    """What a manifest says that depends on the kind of its shards; the codebook is written here."""
    spec = header.tokenizer
    if not isinstance(spec, TokenizerSpec):
        return {"kind": "features", "features": spec}
    codebook = FileEntry(**_put(store, "codebook-{}.safetensors", encode_codebooks(header.codebooks)))
    return {"tokenizer": spec, "codebook": codebook, "usage": [depth_usage(counts) for counts in usage]}


@dataclass(frozen=True)
class _Part:
    """What one commit record adds to the manifest."""

    unit: str
    shard: ShardEntry | None
    index: pa.Table
    rejects: pa.Table


@dataclass
class _Gathered:
    usage: list[npt.NDArray[np.uint64]]
    parts: list[_Part] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    numerics: set[bytes] = field(default_factory=set)
    views: int = 0
    codes: int = 0

    def shards(self) -> list[ShardEntry]:
        return [part.shard for part in self.parts if part.shard]

    def index(self) -> pa.Table:
        parts = [part.index for part in self.parts if part.shard]
        ordinals = np.repeat(np.arange(len(parts), dtype=np.int32), [part.num_rows for part in parts])
        table = pa.concat_tables([INDEX_SCHEMA.empty_table().drop_columns("shard"), *parts])
        return table.append_column("shard", pa.array(ordinals)).select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)

    def rejects(self) -> pa.Table:
        return pa.concat_tables([REJECTS_SCHEMA.empty_table(), *(part.rejects for part in self.parts)])


def _gather(store: Store, records: Iterable[CommitRecord], mark: str, sizes: Sequence[int]) -> _Gathered:
    """Fold the records, one at a time, into columns; the parts come out in unit order."""
    total = _Gathered(usage=[np.zeros(size, np.uint64) for size in sizes])
    for record in records:
        where = store.path(commit_path(record.unit))
        if record.fingerprint != mark:
            raise FingerprintMismatch(
                f"{where} has fingerprint {record.fingerprint[:16]}, the job has {mark[:16]}: "
                "choose another output folder, or use --replace"
            )
        try:
            histograms = decode_usage(record.usage, sizes)
        except ValueError as error:
            raise VerificationFailed(f"{where} is damaged ({error}): delete it and run the job again") from error
        for sums, counts in zip(total.usage, histograms, strict=True):
            sums += counts
        total.parts.append(_part(store, record))
        total.reasons.update(row.reason for row in record.rejects)
        total.numerics.add(canonical_json(record.numerics.model_dump(mode="json")))
        total.views += record.views
        total.codes += record.codes
    total.parts.sort(key=lambda part: unit_order(part.unit))
    return total


def _part(store: Store, record: CommitRecord) -> _Part:
    members = record.members.table().select(["image_id", "size", "mtime_ns"])
    members = members.rename_columns({"size": "source_size", "mtime_ns": "source_mtime_ns"})
    rejected = pa.array([row.image_id for row in record.rejects], pa.string())
    rejects = members.take(pc.index_in(rejected, value_set=members["image_id"]))
    for name, kind in (("reason", pa.string()), ("message", pa.string()), ("source_row", pa.int64())):
        rejects = rejects.append_column(name, pa.array([getattr(row, name) for row in record.rejects], kind))
    rejects = rejects.select(REJECTS_SCHEMA.names).cast(REJECTS_SCHEMA)
    kept = members.filter(pc.invert(pc.is_in(members["image_id"], value_set=rejected)))
    index = kept if record.shard is None else _index_of(store, record.shard, kept)
    return _Part(record.unit, record.shard, index, rejects)


def _index_of(store: Store, shard: ShardEntry, kept: pa.Table) -> pa.Table:
    """The index rows of a shard, all but its ordinal; the shard must hold the images that were kept, in order."""
    path = store.path(shard.path)
    advice = f"delete {commit_path(shard.unit)} and run the job again to make its unit anew"
    if not store.exists(shard.path) or store.size(shard.path) != shard.bytes:
        raise VerificationFailed(f"{path} is missing or does not have its {shard.bytes} bytes: {advice}")
    rows = read_shard(path, ["image_id", "sha256", "width", "height"])
    if not rows["image_id"].equals(kept["image_id"]):
        raise VerificationFailed(f"{path} does not hold the images of its commit record: {advice}")
    rows = rows.replace_schema_metadata(None)
    rows = rows.append_column("row", pa.array(np.arange(rows.num_rows, dtype=np.int32)))
    for name in ("source_size", "source_mtime_ns"):
        rows = rows.append_column(name, kept[name])
    return rows.cast(pa.schema([INDEX_SCHEMA.field(name) for name in rows.schema.names]))


def _refuse_duplicates(store: Store, ids: pa.ChunkedArray) -> None:
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        name = twice[0]["values"].as_py()
        raise VerificationFailed(
            f"{name!r} is a member of more than one unit of {store.location} ({len(twice)} such images): "
            "delete its commit records and run the job again"
        )


def _put(store: Store, pattern: str, data: bytes) -> dict[str, Any]:
    """Write a content-named file unless it is there and whole; return the fields of its entry."""
    sha256 = hashlib.sha256(data).hexdigest()
    path = pattern.format(sha256[:16])
    if not store.exists(path) or store.read(path) != data:
        store.write(path, data)
    return {"path": path, "bytes": len(data), "sha256": sha256}


def _publish(store: Store, manifest: Manifest) -> Manifest:
    if store.exists(MANIFEST_NAME):
        data = store.read(MANIFEST_NAME)
        try:
            old: Manifest | None = Manifest.model_validate_json(data)
        except ValidationError:
            old = None  # damaged; the commit records say all that it said
        if old and _document(manifest.model_copy(update={"provenance": old.provenance})) == data:
            _put(store, "snapshots/{}.json", data)
            return old
    data = _document(manifest)
    _put(store, "snapshots/{}.json", data)
    store.write(MANIFEST_NAME, data)
    return Manifest.model_validate_json(data)


def _document(manifest: Manifest) -> bytes:
    """The bytes of a manifest: fields in their declared order, free-form settings sorted by key."""
    ordered = Manifest.model_validate_json(canonical_json(manifest.model_dump(mode="json")))
    return ordered.model_dump_json(indent=2).encode() + b"\n"
