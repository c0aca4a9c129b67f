"""Check a token set and report every problem found, each with a code that stays the same between versions.

Codes: manifest_missing, manifest_invalid, shards_file_invalid, fingerprint_mismatch, codebook_missing,
codebook_sha256, codebook_invalid, index_missing, index_sha256, index_mismatch, rejects_missing, rejects_sha256,
rejects_mismatch, shard_missing, shard_size, shard_sha256, shard_schema, shard_rows, row_length, code_range, not_finite,
duplicate_id, totals, usage, commit_invalid; from `tokenize_stage.recompute` also recompute_mismatch, recompute_views.
Files that nothing names are no problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests.check_shard import IDENTITY_COLUMNS, ShardFindings, check_shard
from manifests.codebook import decode_codebooks
from manifests.commits import list_commits, read_commit
from manifests.errors import InputError, VerificationFailed
from manifests.fingerprint import fingerprint
from manifests.parallel import ordered_map
from manifests.reader import locate_manifest, read_entry, read_manifest, read_shard_list
from manifests.report import Problem, StatusReport, VerifyReport, mixed_devices
from manifests.schema import MANIFEST_NAME, FileEntry, Manifest, ShardEntry, TableEntry
from manifests.shard_reader import read_parquet
from manifests.shards import INDEX_SCHEMA, REJECTS_SCHEMA
from manifests.status import refuse_run, status
from manifests.storage import LEASE_NAME, Store
from manifests.usage import depth_usage

__all__ = ["Problem", "StatusReport", "VerifyReport", "status", "verify"]

_PERPLEXITY_TOLERANCE = 1e-3
_THREADS = 8  # shards that are checked at once


def verify(
    folder: str | Path, *, deep: bool = True, progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Check the token set in an output folder (or of one manifest) and report all that is wrong with it.

    `deep` reads and hashes every byte and compares every row with the index; without it, sizes, footers and side
    files are checked. `progress(done, total)` is called after each shard. Raises `InputError` only when the
    folder holds nothing of a token set.
    """
    store, name = locate_manifest(folder)
    if name == MANIFEST_NAME and not store.exists(name):
        if not (store.exists(LEASE_NAME) or store.exists("commits") or store.exists("shards")):
            raise InputError(f"{folder} holds no token set: give the output folder of a tokenize job")
        refuse_run(store, folder)
        message = f"{store.location} has no {MANIFEST_NAME}: run the tokenize job again to finish it"
        return VerifyReport(problems=[Problem("manifest_missing", MANIFEST_NAME, message)])
    try:
        store, manifest, _ = read_manifest(folder)
    except VerificationFailed as error:
        return VerifyReport(problems=[Problem("manifest_invalid", name, str(error))])
    problems = list(_check_codebook(store, manifest))
    index = _load_table(store, "index", manifest.index, INDEX_SCHEMA, problems)
    rejects = _load_table(store, "rejects", manifest.rejects, REJECTS_SCHEMA, problems)
    if rejects is not None:
        problems.extend(_check_rejects(manifest, rejects))
    shards, listing = manifest.shards, manifest.shards_file
    if listing:
        try:
            shards = read_shard_list(store, listing)
        except VerificationFailed as error:  # then nothing can be said of the shards
            problems.append(Problem("shards_file_invalid", listing.path, str(error)))
            return _report(manifest, 0, problems)
    problems.extend(_check_document(manifest, shards))
    if index is not None:
        problems.extend(_check_index(manifest, shards, index))
    problems.extend(_check_shards(store, manifest, shards, index, rejects, deep=deep, progress=progress))
    if deep:
        problems.extend(_check_commits(store))
    return _report(manifest, len(shards), problems)


def _report(manifest: Manifest, shards: int, problems: list[Problem]) -> VerifyReport:
    totals = manifest.totals
    notes = [note] if (note := mixed_devices(manifest.provenance.numerics)) else []
    return VerifyReport(totals.images, totals.ok, totals.rejected, shards, manifest.fingerprint, problems, notes)


def _check_document(manifest: Manifest, shards: Sequence[ShardEntry]) -> Iterator[Problem]:
    """What the manifest says about itself must agree."""
    if fingerprint(manifest.fingerprint_keys) != manifest.fingerprint:
        yield Problem("fingerprint_mismatch", MANIFEST_NAME, "the fingerprint is not the hash of the fingerprint keys")
    totals = manifest.totals
    rows = sum(shard.rows for shard in shards)
    said = {
        f"its shards have {rows} rows": rows,
        f"its index has {manifest.index.rows} rows": manifest.index.rows,
    }
    for text, count in said.items():
        if count != totals.ok:
            yield Problem("totals", MANIFEST_NAME, f"the manifest says that {totals.ok} images are ok, but {text}")
    if manifest.rejects.rows != totals.rejected or sum(totals.rejected_by_reason.values()) != totals.rejected:
        yield Problem("totals", MANIFEST_NAME, f"the manifest counts {totals.rejected} rejects in more than one way")
    if len({shard.path for shard in shards}) != len(shards):
        yield Problem("manifest_invalid", MANIFEST_NAME, "the manifest lists a shard twice")


def _check_codebook(store: Store, manifest: Manifest) -> Iterator[Problem]:
    entry, spec = manifest.codebook, manifest.tokenizer
    if entry is None or spec is None:
        return  # features have none
    data = _read_side_file(store, "codebook", entry)
    if isinstance(data, Problem):
        yield data
        return
    try:
        decode_codebooks(data, spec.codebook_sizes, spec.code_dim, entry.path)
    except VerificationFailed as error:
        yield Problem("codebook_invalid", entry.path, str(error))


def _read_side_file(store: Store, name: str, entry: FileEntry) -> bytes | Problem:
    absent = not store.exists(entry.path)
    try:
        return read_entry(store, entry, limit=entry.bytes)
    except VerificationFailed as error:
        return Problem(f"{name}_{'missing' if absent else 'sha256'}", entry.path, str(error))


def _load_table(
    store: Store, name: str, entry: TableEntry, schema: pa.Schema, problems: list[Problem]
) -> pa.Table | None:
    data = _read_side_file(store, name, entry)
    if isinstance(data, Problem):
        problems.append(data)
        return None
    try:
        table = read_parquet(pa.py_buffer(data), entry.path)
    except VerificationFailed as error:
        problems.append(Problem(f"{name}_mismatch", entry.path, str(error)))
        return None
    if not table.schema.equals(schema) or table.num_rows != entry.rows:
        message = f"{entry.path} does not have the columns of an {name} file and {entry.rows} rows"
        problems.append(Problem(f"{name}_mismatch", entry.path, message))
        return None
    return table


def _check_rejects(manifest: Manifest, rejects: pa.Table) -> Iterator[Problem]:
    counted = {row["values"]: row["counts"] for row in pc.value_counts(rejects["reason"]).to_pylist()}
    if counted != manifest.totals.rejected_by_reason:
        message = f"its reasons are {counted}, the manifest says {manifest.totals.rejected_by_reason}"
        yield Problem("rejects_mismatch", manifest.rejects.path, message)


def _check_index(manifest: Manifest, shards: Sequence[ShardEntry], index: pa.Table) -> Iterator[Problem]:
    """The index walks through the shards in order, row by row."""
    rows = np.asarray([shard.rows for shard in shards], np.int64)
    starts = np.cumsum(rows) - rows
    ordinals = np.repeat(np.arange(len(shards)), rows)
    places = np.arange(len(ordinals)) - starts[ordinals]
    if not (np.array_equal(index["shard"].to_numpy(), ordinals) and np.array_equal(index["row"].to_numpy(), places)):
        message = "its shard and row columns do not walk through the shards of the manifest in order"
        yield Problem("index_mismatch", manifest.index.path, message)


def _check_shards(
    store: Store,
    manifest: Manifest,
    shards: Sequence[ShardEntry],
    index: pa.Table | None,
    rejects: pa.Table | None,
    *,
    deep: bool,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Problem]:
    whole = ShardFindings(histograms=[np.zeros(size, np.int64) for size in manifest.producer.codebook_sizes])
    ids: list[pa.ChunkedArray] = [] if rejects is None else [rejects["image_id"]]
    if not deep and index is not None:
        ids.append(index["image_id"])
    start = 0
    intact = True
    results = ordered_map(lambda shard: check_shard(store, shard, manifest, deep=deep), shards, threads=_THREADS)
    for done, (shard, found) in enumerate(zip(shards, results, strict=True), 1):
        yield from found.problems
        intact = intact and not found.problems
        if found.rows is not None:
            ids.append(found.rows["image_id"])
            if index is not None:
                yield from _compare_with_index(shard, found.rows, index.slice(start, shard.rows))
        for total, counts in zip(whole.histograms, found.histograms, strict=False):
            total += counts
        whole.views += found.views
        whole.codes += found.codes
        start += shard.rows
        if progress:
            progress(done, len(shards))
    yield from _check_duplicates(ids)
    if deep and intact:  # with a shard missing, its codes are missing too, which says nothing new
        yield from _check_sums(manifest, whole)


def _compare_with_index(shard: ShardEntry, rows: pa.Table, index: pa.Table) -> Iterator[Problem]:
    for name in IDENTITY_COLUMNS:
        if not rows[name].equals(index[name]):
            yield Problem(
                "index_mismatch", shard.path, f"the index and {shard.path} do not have the same {name} values"
            )


def _check_duplicates(ids: Sequence[pa.ChunkedArray]) -> Iterator[Problem]:
    counts = pc.value_counts(pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string()))
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        first = twice[0]["values"].as_py()
        yield Problem("duplicate_id", MANIFEST_NAME, f"{len(twice)} images stand in the set twice, first {first!r}")


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


def _check_commits(store: Store) -> Iterator[Problem]:
    """The next job starts from the commit records, so a damaged one is worth knowing before."""

    def check(unit: str) -> Problem | None:
        try:
            read_commit(store, unit)
        except VerificationFailed as error:
            return Problem("commit_invalid", f"commits/{unit}", str(error))
        return None

    yield from (problem for problem in ordered_map(check, list_commits(store), threads=_THREADS) if problem)
