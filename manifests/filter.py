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
from manifests.schema import Manifest, SourceIdentity
from manifests.storage import Store
from manifests.where import where


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
    index, rejects = one.opened.index(), one.opened.rejects()
    ok, rejected = _chosen(index["image_id"], choice), _chosen(rejects["image_id"], choice)
    if choice.condition is not None:
        ok &= where(choice.condition, index)
        rejected[:] = False
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
        for done, (record, keep) in enumerate(choose(one, ok, rejected), 1):
            if copy_unit(one, record, keep, store, record.unit):
                units.append(record.unit)
            if progress:
                progress(done, len(one.units))
        source = SourceIdentity(kind="filter", location=one.opened.manifest.source.location, settings=settings)
        manifest = publish(store, header_of(one.opened, source=source), units)
    return FilterReport(manifest, _absent(choice, index["image_id"], rejects["image_id"]))


def _chosen(ids: pa.ChunkedArray, choice: Choice) -> npt.NDArray[np.bool_]:
    keep = np.ones(len(ids), bool)
    if choice.ids is not None:
        keep &= np.asarray(pc.is_in(ids, value_set=choice.ids).to_pylist(), bool)
    if choice.exclude is not None:
        keep &= ~np.asarray(pc.is_in(ids, value_set=choice.exclude).to_pylist(), bool)
    return keep


def _absent(choice: Choice, ok: pa.ChunkedArray, rejected: pa.ChunkedArray) -> int:
    """How many of the ids asked for are neither ok nor rejected."""
    asked = [ids for ids in (choice.ids, choice.exclude) if ids is not None]
    if not asked:
        return 0
    distinct = pc.unique(pa.concat_arrays(asked))
    known = pc.or_(pc.is_in(distinct, value_set=ok), pc.is_in(distinct, value_set=rejected))
    return len(distinct) - int(pc.sum(known).as_py() or 0)


def _digest(ids: pa.Array | None) -> str | None:
    """What is remembered of a list of ids: so that the same command is known again."""
    return None if ids is None else digest(ids.to_pylist())
