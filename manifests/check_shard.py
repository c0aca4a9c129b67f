"""Everything that can be wrong with one shard, found in one read of its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import StorageError, VerificationFailed
from manifests.reader import shard_problems
from manifests.report import Problem
from manifests.schema import FeaturesSpec, Manifest, ShardEntry
from manifests.shard_reader import open_parquet, open_shard, read_parquet
from manifests.shards import list_values, made_as, shard_mark, shard_schema, value_column
from manifests.storage import Store
from manifests.versions import READABLE_SHARDS

_LARGEST_SHARD = 1 << 33  # the int32 values of the longest list that Arrow offsets can reach

IDENTITY_COLUMNS = ["image_id", "sha256", "width", "height"]


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


def check_shard(store: Store, shard: ShardEntry, manifest: Manifest, *, deep: bool) -> ShardFindings:
    """Check size, footer and schema of a shard and, when `deep`, its bytes and every row."""
    found = ShardFindings()

    def report(code: str, message: str) -> None:
        found.problems.append(Problem(code, shard.path, message))

    found.problems.extend(shard_problems(store, [shard]))
    if found.problems:
        return found
    path = store.where(shard.path)
    try:
        data = store.read(shard.path) if deep else None
        if data is not None and hashlib.sha256(data).hexdigest() != shard.sha256:
            report("shard_sha256", f"{path} is damaged (another sha256): delete it and run the tokenize job again")
            return found  # whatever else it says is not worth believing, nor safe to parse
        opened = open_shard(store, shard.path) if data is None else open_parquet(pa.py_buffer(data), path)
        with opened as file:
            readable = _check_footer(file, shard, manifest, report)
        if data is not None and readable:
            columns = [*IDENTITY_COLUMNS, "view_boxes", manifest.kind]
            _check_rows(read_parquet(pa.py_buffer(data), path, columns), manifest, found, report)
    except VerificationFailed as error:
        report("shard_schema", str(error))
    except StorageError as error:
        if not store.is_local:
            raise  # the network or the rights are at fault, and every other shard would say the same
        report("shard_missing", str(error))
    return found


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


def _check_rows(table: pa.Table, manifest: Manifest, found: ShardFindings, report: Callable[[str, str], None]) -> None:
    spec = manifest.producer
    found.rows = table.select(IDENTITY_COLUMNS).replace_schema_metadata(None)
    names = table["image_id"]
    values, offsets = list_values(table[manifest.kind])
    boxes, box_offsets = list_values(table["view_boxes"])
    lengths, box_lengths = np.diff(offsets), np.diff(box_offsets)
    found.views = int(box_lengths.sum()) // 4
    per_view = spec.positions * spec.values
    bad = np.flatnonzero((lengths == 0) | (lengths * 4 != box_lengths * per_view))
    if len(bad):
        report(
            "row_length",
            f"{len(bad)} rows, first {names[int(bad[0])].as_py()!r}, do not have {per_view} {manifest.kind} for each view",
        )
    if not np.isfinite(boxes).all():
        report("row_length", "some view_boxes are not finite")
    if isinstance(spec, FeaturesSpec):
        finite = value_column(spec).finite(values)
        if not finite.all():
            rows = np.unique(np.searchsorted(offsets, np.flatnonzero(~finite), side="right") - 1)
            report(
                "not_finite",
                f"{len(rows)} rows, first {names[int(rows[0])].as_py()!r}, have features that are NaN or infinite",
            )
        return
    found.codes = int(lengths.sum())
    if (lengths % spec.depth).any():
        return  # depths cannot be told apart
    codes_ND: npt.NDArray[Any] = values.reshape(-1, spec.depth)
    if len(codes_ND) and (codes_ND.max(axis=0) >= np.asarray(spec.codebook_sizes)).any():
        outside = (codes_ND >= np.asarray(spec.codebook_sizes)).any(axis=1)
        rows = np.unique(np.searchsorted(offsets, np.flatnonzero(outside) * spec.depth, side="right") - 1)
        report(
            "code_range",
            f"{len(rows)} rows, first {names[int(rows[0])].as_py()!r}, have codes beyond their codebook",
        )
        codes_ND = codes_ND[~outside]
    found.histograms = [
        np.bincount(codes_ND[:, depth], minlength=size) for depth, size in enumerate(spec.codebook_sizes)
    ]
