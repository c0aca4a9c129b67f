"""The commit protocol on disk: units are committed one by one, then the manifest is assembled from their records.

OUTPUT/ manifest.json, snapshots/DIGEST16.json, shards/UNIT-SHA16.parquet, index-SHA16.parquet,
rejects-SHA16.parquet, codebook-SHA16.safetensors, commits/UNIT.json.zst. A record is written after its shard
and before the manifest that names it, by the one driver that holds the lease; resuming is a set difference
over the records. Whatever no manifest names does not exist for a reader.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import zstandard
from pydantic import ValidationError

from manifests.codebook import encode_codebooks
from manifests.commit_record import (
    COMMITS,
    RECORD_SUFFIX,
    CommitRecord,
    MemberColumns,
    RejectRow,
    UnitMember,
    commit_path,
    unit_order,
)
from manifests.documents import compress, decompress, first_problem
from manifests.errors import VerificationFailed
from manifests.fingerprint import canonical_json, fingerprint
from manifests.gather import gather
from manifests.repeated_ids import RepeatedIds, columns_of
from manifests.schema import (
    MANIFEST_NAME,
    FileEntry,
    Geometry,
    Manifest,
    Producer,
    Provenance,
    SourceIdentity,
    TableEntry,
    TokenizerSpec,
    Totals,
)
from manifests.shards import INDEX_SCHEMA, REJECTS_SCHEMA
from manifests.storage import Store
from manifests.table_writer import TableWriter
from manifests.usage import decode_usage, depth_usage, encode_usage
from manifests.versions import RECORD_UPGRADES, parsed

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
    "read_commits",
    "write_commit",
]

INLINE_SHARDS = 10_000
"""Up to here the manifest lists its shards itself; longer lists go to a zstd side file."""

_LARGEST_RECORD = 1 << 30


def write_commit(store: Store, record: CommitRecord) -> None:
    """Commit a unit: from here on its shard is part of the set. Hold the lease."""
    store.write(commit_path(record.unit), compress(record.model_dump_json().encode()))


def read_commit(store: Store, unit: str) -> CommitRecord:
    """The record of a committed unit; a damaged or missing one is `VerificationFailed` naming its file."""
    path = commit_path(unit)
    if not store.exists(path):
        raise VerificationFailed(f"{store.where(path)} is missing: run the tokenize stage again to make its unit")
    return _record(store, unit, store.read(path))


def read_commits(store: Store) -> Iterator[CommitRecord]:
    """The records of all committed units in unit order, one at a time; errors as of `read_commit`."""
    units = list_commits(store)
    for unit, data in zip(units, store.read_many([commit_path(unit) for unit in units]), strict=True):
        yield _record(store, unit, data)


def _record(store: Store, unit: str, data: bytes) -> CommitRecord:
    where = store.where(commit_path(unit))
    try:
        record = parsed(CommitRecord, decompress(data, limit=_LARGEST_RECORD), RECORD_UPGRADES, where)
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
    names = [path[len(COMMITS) : -len(RECORD_SUFFIX)] for path in store.list(COMMITS) if path.endswith(RECORD_SUFFIX)]
    return sorted((name for name in names if "/" not in name), key=unit_order)


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

    The records of a list may come in any order; those of an iterator, of which only some are held at a time, come in
    unit order. The same content gives the same bytes except the provenance, and when only that would change, the
    manifest on disk stays and no snapshot is added. Raises `FingerprintMismatch` for a record of another fingerprint
    and `VerificationFailed` for a shard that does not match its record or an image_id that two units share.
    """
    mark = fingerprint(header.fingerprint_keys)
    if isinstance(records, Sequence):
        records = sorted(records, key=lambda record: unit_order(record.unit))
    with store.scratch() as index_file, store.scratch() as rejects_file:
        with TableWriter(index_file, INDEX_SCHEMA) as index, TableWriter(rejects_file, REJECTS_SCHEMA) as rejects:
            gathered = gather(store, records, mark, header.tokenizer.codebook_sizes, index, rejects)
        _refuse_duplicates(store, gathered.ids, (index_file, rejects_file))
        index_entry = TableEntry(**_put(store, "index-{}.parquet", index_file), rows=index.rows)
        rejects_entry = TableEntry(**_put(store, "rejects-{}.parquet", rejects_file), rows=rejects.rows)
    shards, shards_file = gathered.shards, None
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
        index=index_entry,
        rejects=rejects_entry,
        totals=Totals(
            images=index.rows + rejects.rows,
            ok=index.rows,
            rejected=rejects.rows,
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


def _refuse_duplicates(store: Store, ids: RepeatedIds, tables: Iterable[BinaryIO]) -> None:
    batches = (batch for table in tables for batch in pq.ParquetFile(table).iter_batches(columns=["image_id"]))
    if twice := ids.find(columns_of(batches)):
        raise VerificationFailed(
            f"{twice.first!r} is a member of more than one unit of {store.location} ({twice.count} such images): "
            "delete its commit records and run the job again"
        )


def _put(store: Store, pattern: str, content: bytes | BinaryIO) -> dict[str, Any]:
    """Write bytes, or what an open file holds, to a content-named file unless it is there and whole; return the fields
    of its entry.
    """
    file = BytesIO(content) if isinstance(content, bytes) else content
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    path = pattern.format(sha256[:16])
    if store.size_if_there(path) != size or store.sha256(path, size) != sha256:
        store.write(path, file)
    return {"path": path, "bytes": size, "sha256": sha256}


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
