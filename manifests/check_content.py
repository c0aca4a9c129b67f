"""Holds the index, the rejects and the shards of a set against each other and the manifest, with a piece of each at a time.

What grows with the number of images is 8 bytes for each: see `manifests.repeated_ids`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests.check_rows import IDENTITY_COLUMNS
from manifests.check_shard import ShardFindings, check_shard
from manifests.parallel import ordered_map
from manifests.repeated_ids import RepeatedIds, columns_of
from manifests.report import Problem
from manifests.schema import MANIFEST_NAME, Manifest, ShardEntry
from manifests.shard_reader import read_shard
from manifests.shards import INDEX_SCHEMA, REJECTS_SCHEMA
from manifests.storage import Store
from manifests.table_reader import RowStream, iter_rows, table_problem
from manifests.usage import depth_usage

_PERPLEXITY_TOLERANCE = 1e-3
_THREADS = 8  # shards that are checked at once


class ContentCheck:
    """The checks of one set, in this order: `tables`, `order_of_index`, `shards`."""

    def __init__(self, store: Store, manifest: Manifest, *, deep: bool) -> None:
        self._store, self._manifest, self._deep = store, manifest, deep
        self._has_index = self._has_rejects = False  # until they are seen to be whole

    def tables(self) -> Iterator[Problem]:
        """The files of index and rejects by themselves, and the reasons of the rejects."""
        manifest = self._manifest
        bad_index = table_problem(self._store, "index", manifest.index, INDEX_SCHEMA)
        bad_rejects = table_problem(self._store, "rejects", manifest.rejects, REJECTS_SCHEMA)
        self._has_index, self._has_rejects = bad_index is None, bad_rejects is None
        yield from (problem for problem in (bad_index, bad_rejects) if problem)
        if bad_rejects:
            return
        counted: Counter[str] = Counter()
        for batch in iter_rows(self._store, manifest.rejects.path, ["reason"]):
            counted.update({row["values"]: row["counts"] for row in pc.value_counts(batch["reason"]).to_pylist()})
        if counted != manifest.totals.rejected_by_reason:
            message = f"its reasons are {dict(counted)}, the manifest says {manifest.totals.rejected_by_reason}"
            yield Problem("rejects_mismatch", manifest.rejects.path, message)

    def order_of_index(self, shards: Sequence[ShardEntry]) -> Iterator[Problem]:
        """The index walks through the shards in order, row by row."""
        entry = self._manifest.index
        if not self._has_index:
            return
        rows = np.asarray([shard.rows for shard in shards], np.int64)
        ends = np.cumsum(rows)
        same = entry.rows == rows.sum()
        at = 0
        for batch in iter_rows(self._store, entry.path, ["shard", "row"]) if same else ():
            places = np.arange(at, at + len(batch))
            at += len(batch)
            ordinals = np.searchsorted(ends, places, side="right")
            same = same and np.array_equal(batch["shard"].to_numpy(), ordinals)
            same = same and np.array_equal(batch["row"].to_numpy(), places - (ends - rows)[ordinals])
        if not same:
            message = "its shard and row columns do not walk through the shards of the manifest in order"
            yield Problem("index_mismatch", entry.path, message)

    def shards(
        self, shards: Sequence[ShardEntry], progress: Callable[[int, int], None] | None = None
    ) -> Iterator[Problem]:
        """Every shard by itself and beside the index; ids that stand in the set twice; and what the shards add up to."""
        store, manifest, deep = self._store, self._manifest, self._deep
        whole = ShardFindings(histograms=[np.zeros(size, np.int64) for size in manifest.producer.codebook_sizes])
        ids = RepeatedIds()
        for column in self._listed_ids():
            ids.add(column)
        index = self._identities() if deep and self._has_index else None
        readable: list[ShardEntry] = []
        intact = True
        sizes = store.sizes([shard.path for shard in shards])
        results = ordered_map(
            lambda one: check_shard(store, one[0], manifest, size=one[1], deep=deep),
            zip(shards, sizes, strict=True),
            threads=_THREADS,
        )
        for done, (shard, found) in enumerate(zip(shards, results, strict=True), 1):
            yield from found.problems
            intact = intact and not found.problems
            listed = index.take(shard.rows) if index else None
            if found.rows is not None:
                readable.append(shard)
                ids.add(found.rows["image_id"])
                if listed is not None:
                    yield from _compare_with_index(shard, found.rows, listed)
            for total, counts in zip(whole.histograms, found.histograms, strict=False):
                total += counts
            whole.views += found.views
            whole.codes += found.codes
            if progress:
                progress(done, len(shards))
        if twice := ids.find(self._ids(readable)):
            message = f"{twice.count} images stand in the set twice, first {twice.first!r}"
            yield Problem("duplicate_id", MANIFEST_NAME, message)
        if deep and intact:  # with a shard missing, its codes are missing too, which says nothing new
            yield from _check_sums(manifest, whole)

    def _listed_ids(self) -> Iterator[pa.ChunkedArray]:
        """The ids of the rejects and, where shards are not read, of the index."""
        manifest = self._manifest
        if self._has_rejects:
            yield from columns_of(iter_rows(self._store, manifest.rejects.path, ["image_id"]))
        if self._has_index and not self._deep:
            yield from columns_of(iter_rows(self._store, manifest.index.path, ["image_id"]))

    def _ids(self, readable: Sequence[ShardEntry]) -> Iterator[pa.ChunkedArray]:
        yield from self._listed_ids()
        for shard in readable:
            yield read_shard(self._store, shard.path, ["image_id"])["image_id"]

    def _identities(self) -> RowStream:
        schema = pa.schema([INDEX_SCHEMA.field(name) for name in IDENTITY_COLUMNS])
        return RowStream(iter_rows(self._store, self._manifest.index.path, IDENTITY_COLUMNS), schema)


def _compare_with_index(shard: ShardEntry, rows: pa.Table, index: pa.Table) -> Iterator[Problem]:
    for name in IDENTITY_COLUMNS:
        if not rows[name].equals(index[name]):
            yield Problem(
                "index_mismatch", shard.path, f"the index and {shard.path} do not have the same {name} values"
            )


def _check_sums(manifest: Manifest, whole: ShardFindings) -> Iterator[Problem]:
    totals = manifest.totals
    if (whole.views, whole.codes) != (totals.views, totals.codes):
        message = (
            f"the shards hold {whole.views} views and {whole.codes} codes, "
            f"the manifest says {totals.views} and {totals.codes}"
        )
        yield Problem("totals", MANIFEST_NAME, message)
    usage = manifest.usage or []
    for depth, (counts, said) in enumerate(zip(whole.histograms, usage, strict=False)):
        real = depth_usage(counts)
        if real.used != said.used or abs(real.perplexity - said.perplexity) > _PERPLEXITY_TOLERANCE:
            message = f"the codes of depth {depth} have {real}, the manifest says {said}"
            yield Problem("usage", MANIFEST_NAME, message)
    if len(usage) != len(manifest.producer.codebook_sizes):
        yield Problem("usage", MANIFEST_NAME, "the manifest does not state the usage of each depth")
