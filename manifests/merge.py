"""Merge finished token sets of one fingerprint into a new one: shards are linked or copied, nothing is encoded.

The unit `u000003` of the second set becomes `1.u000003`, so a unit's name says which of `source.settings.sources` it came
from, and with it below which image root the locators of its shard lie: image ids and locators stay as they were.
An image that stands in several sets is kept once, as the first of them has it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from manifests.schema import Manifest, SourceIdentity
from manifests.storage import Store

COMPARED_AT_ONCE = 4_096


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
        for number, one in enumerate(sets):
            ok, rejected = (
                ~_among(table["image_id"], dropped[number]) for table in (one.opened.index(), one.opened.rejects())
            )
            for record, keep in choose(one, ok, rejected):
                if copy_unit(one, record, keep, store, f"{number}.{record.unit}"):
                    units.append(f"{number}.{record.unit}")
                if progress:
                    progress(len(units), sum(len(part.units) for part in sets))
        source = SourceIdentity(kind="merge", location=_common(sources), settings={"sources": sources})
        errors = sum(one.opened.manifest.totals.source_errors for one in sets)
        manifest = publish(store, header_of(sets[0].opened, source=source, source_errors=errors), units)
    return MergeReport(manifest, sum(len(ids) for ids in dropped))


def _duplicates(sets: Sequence[FinishedSet]) -> list[pa.Array]:
    """For each set the image ids that it must not bring along, because another set has them."""
    ok = [one.opened.index()["image_id"] for one in sets]
    rejected = [one.opened.rejects()["image_id"] for one in sets]
    dropped: list[list[pa.Array]] = [[] for _ in sets]
    for later in range(1, len(sets)):
        for earlier in range(later):
            twice = _both(_without(ok[later], dropped[later]), _without(ok[earlier], dropped[earlier]))
            _refuse_disagreement(sets[earlier], sets[later], twice)
            dropped[later].append(twice)
            dropped[later].append(_both(_without(rejected[later], dropped[later]), ok[earlier]))
            dropped[later].append(_both(_without(rejected[later], dropped[later]), rejected[earlier]))
            dropped[earlier].append(_both(_without(rejected[earlier], dropped[earlier]), ok[later]))
    return [pa.concat_arrays([pa.array([], pa.string()), *parts]) for parts in dropped]


def _among(ids: pa.ChunkedArray, chosen: pa.Array) -> npt.NDArray[np.bool_]:
    """Which of `ids` are among `chosen`."""
    return np.asarray(pc.is_in(ids, value_set=chosen).to_pylist(), bool)


def _both(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays([pa.array([], pa.string()), *left.filter(pc.is_in(left, value_set=right)).chunks])


def _without(ids: pa.ChunkedArray, gone: Sequence[pa.Array]) -> pa.ChunkedArray:
    for part in gone:
        if len(part):
            ids = ids.filter(pc.invert(pc.is_in(ids, value_set=part)))
    return ids


def _refuse_disagreement(left: FinishedSet, right: FinishedSet, ids: pa.Array) -> None:
    """Both sets must say the same of images that both hold."""
    for start in range(0, len(ids), COMPARED_AT_ONCE):
        names: list[str] = ids.slice(start, COMPARED_AT_ONCE).to_pylist()
        bytes_of = [_sha256(one, names) for one in (left, right)]
        values = [_values(one, names) for one in (left, right)]
        for name, *hashes, one, other in zip(names, *bytes_of, *values, strict=True):
            if hashes[0] != hashes[1]:
                raise InputError(
                    f"{left.location} and {right.location} both hold {name!r}, with different bytes: "
                    "filter it out of one of them first (asvr manifest filter --exclude-ids)"
                )
            if not np.array_equal(one, other):
                raise InputError(
                    f"{left.location} and {right.location} hold different {left.opened.manifest.kind} of {name!r}: "
                    "filter it out of one of them first (asvr manifest filter --exclude-ids)"
                )


def _sha256(one: FinishedSet, names: list[str]) -> list[str]:
    index = one.opened.index()
    found: list[str] = index["sha256"].take(pc.index_in(pa.array(names), value_set=index["image_id"])).to_pylist()
    return found


def _values(one: FinishedSet, names: list[str]) -> Sequence[npt.NDArray[Any]]:
    opened = one.opened
    return opened.read_codes(names) if opened.manifest.tokenizer else opened.read_features(names)


def _common(sources: Sequence[dict[str, Any]]) -> str:
    """Where the images come from, if that is one place."""
    places = list(dict.fromkeys(str(source["location"]) for source in sources))
    return places[0] if len(places) == 1 else "several, see settings.sources"
