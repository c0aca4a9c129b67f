"""Merge finished token sets of one fingerprint into a new one: shards are linked or copied, nothing is encoded.

The unit `u000003` of the second set becomes `1.u000003`, so a unit's name says which of `source.settings.sources` it came
from, and with it below which image root the locators of its shard lie: image ids and locators stay as they were.
An image that stands in several sets is kept once, as the first of them has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.derived import (
    FinishedSet,
    Progress,
    begin_derived,
    choose,
    copy_unit,
    described,
    finished_set,
    header_of,
    publish,
)
from manifests.errors import InputError
from manifests.fingerprint import check_same
from manifests.forgotten import forgotten_digests
from manifests.id_index import IdIndex
from manifests.reader import OpenManifest
from manifests.repeated_ids import Hashes, RepeatedIds, columns_of, have_hash
from manifests.schema import Manifest, SourceIdentity
from manifests.shards import INDEX_SCHEMA, REJECTS_SCHEMA
from manifests.storage import Store

COMPARED_AT_ONCE = 4_096

_PLACE_COLUMNS = ["image_id", "sha256", "shard", "row"]


@dataclass(frozen=True)
class MergeReport:
    """The new manifest, and how many images stood in several sets and were kept once."""

    manifest: Manifest
    duplicates: int


def merge_sets(inputs: Sequence[str | Path], store: Store, *, progress: Progress | None = None) -> MergeReport:
    """Make the set in `store` from those at `inputs`, which are not changed; `progress` hears of units done and in all.

    Images that several sets hold must have the same bytes and the same codes (features) in all of them; where one set
    rejected an image and another did not, the latter is kept. Raises `FingerprintMismatch` naming the keys that
    differ, `InputError` for sets that are not finished, that disagree about an image, or a folder that is not empty,
    and `VerificationFailed` for damage. Interrupted, the same call completes it.
    """
    if len(inputs) < 2:
        raise InputError("a merge needs at least two token sets: give their output folders")
    sets = [finished_set(location) for location in inputs]
    first = sets[0].opened.manifest
    for other in sets[1:]:
        check_same(first.fingerprint_keys, other.opened.manifest.fingerprint_keys, where=other.location)
    if len({one.location for one in sets} | {store.location}) <= len(sets):
        raise InputError("a token set is given twice, or is also the output: give each folder once")
    dropped = _duplicates(sets)
    sources = [described(one.opened.manifest.source) for one in sets]
    description = {
        "verb": "merge",
        "inputs": [{"location": one.location, "manifest_sha256": one.opened.digest} for one in sets],
    }
    with store.lease("manifest merge"):
        begin_derived(store, description)
        units: list[str] = []
        forgotten = forgotten_digests(store)
        for number, one in enumerate(sets):
            for record, keep in choose(one, *_staying(one.opened, dropped[number]), forgotten):
                if copy_unit(one, record, keep, store, f"{number}.{record.unit}"):
                    units.append(f"{number}.{record.unit}")
                if progress:
                    progress(len(units), sum(len(part.units) for part in sets))
        source = SourceIdentity(kind="merge", location=_common(sources), settings={"sources": sources})
        errors = sum(one.opened.manifest.totals.source_errors for one in sets)
        manifest = publish(store, header_of(sets[0].opened, source=source, source_errors=errors), units)
    return MergeReport(manifest, sum(len(ids) for ids in dropped))


@dataclass(frozen=True)
class _Shared:
    """What of a set may stand in another one too: the images whose id has a hash that came more than once.

    `ok` has id, bytes and place of those in the index, `places` finds their rows in it.
    """

    one: FinishedSet
    ok: pa.Table
    places: IdIndex
    rejected: pa.ChunkedArray


def _duplicates(sets: Sequence[FinishedSet]) -> list[pa.ChunkedArray]:
    """For each set the image ids that it must not bring along, because another set has them."""
    shared = _shared(sets)
    dropped: list[list[pa.ChunkedArray]] = [[] for _ in sets]
    for later in range(1, len(shared)):
        for earlier in range(later):
            mine, others = shared[later], shared[earlier]
            twice = _both(
                _without(mine.ok["image_id"], dropped[later]), _without(others.ok["image_id"], dropped[earlier])
            )
            _refuse_disagreement(others, mine, twice)
            dropped[later].append(twice)
            dropped[later].append(_both(_without(mine.rejected, dropped[later]), others.ok["image_id"]))
            dropped[later].append(_both(_without(mine.rejected, dropped[later]), others.rejected))
            dropped[earlier].append(_both(_without(others.rejected, dropped[earlier]), mine.ok["image_id"]))
    return [pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string()) for parts in dropped]


def _shared(sets: Sequence[FinishedSet]) -> list[_Shared]:
    """What the sets may share; nothing of any where no hash came twice, as is usual: then 8 bytes an image were held."""
    repeated = RepeatedIds()
    for readings in ([one.opened.iter_index for one in sets], [one.opened.iter_rejects for one in sets]):
        for read in readings:
            for ids in columns_of(read(["image_id"])):
                repeated.add(ids)
    hashes = repeated.hashes()
    if not len(hashes):
        return []
    found = []
    for one in sets:
        ok = _suspects(one.opened.iter_index(_PLACE_COLUMNS), hashes, INDEX_SCHEMA, _PLACE_COLUMNS)
        rejected = _suspects(one.opened.iter_rejects(["image_id"]), hashes, REJECTS_SCHEMA, ["image_id"])
        found.append(_Shared(one, ok, IdIndex(ok["image_id"]), rejected["image_id"]))
    return found


def _suspects(batches: Iterator[pa.RecordBatch], hashes: Hashes, schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    parts = [batch.filter(pa.array(have_hash(pa.chunked_array([batch.column(0)]), hashes))) for batch in batches]
    return pa.Table.from_batches(parts, pa.schema([schema.field(name) for name in columns])).combine_chunks()


def _staying(opened: OpenManifest, dropped: pa.ChunkedArray) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which rows of the index and which of the rejects are not dropped: a byte for each image."""
    manifest = opened.manifest
    if not len(dropped):
        return np.ones(manifest.index.rows, bool), np.ones(manifest.rejects.rows, bool)
    index = IdIndex(dropped)
    ok, rejected = (
        np.concatenate([np.empty(0, bool), *(index.find(ids) < 0 for ids in columns_of(read(["image_id"])))])
        for read in (opened.iter_index, opened.iter_rejects)
    )
    return ok, rejected


def _both(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.ChunkedArray:
    return left.filter(pc.is_in(left, value_set=right))


def _without(ids: pa.ChunkedArray, gone: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    for part in gone:
        if len(part):
            ids = ids.filter(pc.invert(pc.is_in(ids, value_set=part)))
    return ids


def _refuse_disagreement(left: _Shared, right: _Shared, ids: pa.ChunkedArray) -> None:
    """Both sets must say the same of images that both hold."""
    sets = (left, right)
    places = [shared.places.find(ids) for shared in sets]
    for start in range(0, len(ids), COMPARED_AT_ONCE):
        names: list[str] = ids.slice(start, COMPARED_AT_ONCE).to_pylist()
        rows = [
            shared.ok.take(pa.array(at[start : start + COMPARED_AT_ONCE]))
            for shared, at in zip(sets, places, strict=True)
        ]
        bytes_of = [table["sha256"].to_pylist() for table in rows]
        values = [
            shared.one.opened.values_at(table["shard"].to_numpy(), table["row"].to_numpy())
            for shared, table in zip(sets, rows, strict=True)
        ]
        for name, *hashes, one, other in zip(names, *bytes_of, *values, strict=True):
            if hashes[0] != hashes[1]:
                raise InputError(
                    f"{left.one.location} and {right.one.location} both hold {name!r}, with different bytes: "
                    "filter it out of one of them first (asvr manifest filter --exclude-ids)"
                )
            if not np.array_equal(one, other):
                raise InputError(
                    f"{left.one.location} and {right.one.location} hold different {left.one.opened.manifest.kind} of "
                    f"{name!r}: filter it out of one of them first (asvr manifest filter --exclude-ids)"
                )


def _common(sources: Sequence[dict[str, Any]]) -> str:
    """Where the images come from, if that is one place."""
    places = list(dict.fromkeys(str(source["location"]) for source in sources))
    return places[0] if len(places) == 1 else "several, see settings.sources"
