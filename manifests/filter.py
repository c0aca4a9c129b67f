"""Filter a finished token set into a new one: units that stay whole are linked or copied, others are cut, nothing is encoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.derived import Progress, begin_derived, choose, copy_unit, described, finished_set, header_of, publish
from manifests.errors import InputError
from manifests.fingerprint import digest
from manifests.forgotten import forgotten_digests
from manifests.id_index import IdIndex
from manifests.reader import OpenManifest
from manifests.repeated_ids import columns_of
from manifests.schema import Manifest, SourceIdentity
from manifests.shards import INDEX_SCHEMA
from manifests.storage import Store
from manifests.where import COLUMNS, where


@dataclass(frozen=True)
class Choice:
    """Which images stay: those of `ids` (None: all), without `exclude`, and for which the condition holds.

    Rejects have no size, so a condition leaves all of them out.
    """

    ids: pa.Array | None = None
    exclude: pa.Array | None = None
    condition: str | None = None


@dataclass(frozen=True)
class FilterReport:
    """The new manifest, and how many of the ids that were asked for the set does not have."""

    manifest: Manifest
    absent: int


def filter_set(location: str | Path, choice: Choice, store: Store, *, progress: Progress | None = None) -> FilterReport:
    """Make the set in `store` of the images of `choice`, with units, codes and locators as they were.

    Raises `RecipeError` for a condition that is none, `InputError` when nothing is left, the set is not finished
    or the folder is not empty, and `VerificationFailed` for damage. Interrupted, the same call completes it.
    """
    one = finished_set(location)
    if one.location == store.location:
        raise InputError(f"{one.location} is also the output: choose an empty folder")
    names = _Names(choice)
    ok, rejected = _masks(one.opened, names, choice.condition)
    if not ok.any() and not rejected.any():
        raise InputError(f"no image of {one.location} is left: loosen the filter")
    settings = {
        "condition": choice.condition,
        "ids": _digest(choice.ids),
        "exclude_ids": _digest(choice.exclude),
        "source": described(one.opened.manifest.source),
    }
    given = {"location": one.location, "manifest_sha256": one.opened.digest}
    with store.lease("manifest filter"):
        begin_derived(store, {"verb": "filter", "input": given, "settings": settings})
        units = []
        for done, (record, keep) in enumerate(choose(one, ok, rejected, forgotten_digests(store)), 1):
            if copy_unit(one, record, keep, store, record.unit):
                units.append(record.unit)
            if progress:
                progress(done, len(one.units))
        source = SourceIdentity(kind="filter", location=one.opened.manifest.source.location, settings=settings)
        manifest = publish(store, header_of(one.opened, source=source), units)
    return FilterReport(manifest, names.absent)


def _masks(
    opened: OpenManifest, names: _Names, condition: str | None
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which rows of the index and which of the rejects stay, from one pass over each: a byte for each image."""
    columns = ["image_id"] if condition is None else COLUMNS
    index, rejects = opened.iter_index(columns), opened.iter_rejects(["image_id"])
    if condition is not None:  # what is no condition is refused though there be no row
        where(condition, pa.schema([INDEX_SCHEMA.field(name) for name in columns]).empty_table())
    ok, rejected = [np.empty(0, bool)], [np.empty(0, bool)]
    for batch in index:
        table = pa.Table.from_batches([batch])
        keep = names.keep(table["image_id"])
        ok.append(keep if condition is None else keep & where(condition, table))
    for ids in columns_of(rejects):
        keep = names.keep(ids)
        rejected.append(keep if condition is None else np.zeros(len(ids), bool))
    return np.concatenate(ok), np.concatenate(rejected)


class _Names:
    """The ids that a choice names, in 20 bytes each beside themselves; those of the set are looked up among them."""

    def __init__(self, choice: Choice) -> None:
        lists = [ids for ids in (choice.ids, choice.exclude) if ids is not None]
        distinct = pc.unique(pa.concat_arrays([pa.array([], pa.string()), *lists]))
        named = distinct.drop_null()
        self._count = len(distinct)
        self._index = IdIndex(pa.chunked_array([named]))
        self._others = choice.ids is None
        self._stays = np.ones(len(named), bool) if choice.ids is None else _among(named, choice.ids)
        if choice.exclude is not None:
            self._stays &= ~_among(named, choice.exclude)
        self._seen = np.zeros(len(named), bool)

    def keep(self, ids: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """Which of some ids of the set stay."""
        keep = np.full(len(ids), self._others)
        if len(self._seen):
            places = self._index.find(ids)
            named = places >= 0
            keep[named] = self._stays[places[named]]
            self._seen[places[named]] = True
        return keep

    @property
    def absent(self) -> int:
        """How many of the ids asked for did not come by."""
        return self._count - int(self._seen.sum())


def _among(names: pa.Array, ids: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.is_in(names, value_set=ids).to_pylist(), bool)


def _digest(ids: pa.Array | None) -> str | None:
    """What is remembered of a list of ids: so that the same command is known again."""
    return None if ids is None else digest(ids.to_pylist())
