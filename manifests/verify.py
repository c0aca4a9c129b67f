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

from manifests.check_content import ContentCheck
from manifests.codebook import decode_codebooks
from manifests.commits import list_commits, read_commit
from manifests.entries import read_entry
from manifests.errors import InputError, VerificationFailed
from manifests.fingerprint import fingerprint
from manifests.parallel import ordered_map
from manifests.reader import locate_manifest, read_manifest, read_shard_list
from manifests.report import Problem, StatusReport, VerifyReport, mixed_devices
from manifests.schema import MANIFEST_NAME, Manifest, ShardEntry
from manifests.status import refuse_run, status
from manifests.storage import LEASE_NAME, Store

__all__ = ["Problem", "StatusReport", "VerifyReport", "status", "verify"]

_THREADS = 8  # records that are read at once


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
    check = ContentCheck(store, manifest, deep=deep)
    problems.extend(check.tables())
    shards, listing = manifest.shards, manifest.shards_file
    if listing:
        try:
            shards = read_shard_list(store, listing)
        except VerificationFailed as error:  # then nothing can be said of the shards
            problems.append(Problem("shards_file_invalid", listing.path, str(error)))
            return _report(manifest, 0, problems)
    problems.extend(_check_document(manifest, shards))
    problems.extend(check.order_of_index(shards))
    problems.extend(check.shards(shards, progress))
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
    absent = not store.exists(entry.path)
    try:
        data = read_entry(store, entry, limit=entry.bytes)
    except VerificationFailed as error:
        yield Problem(f"codebook_{'missing' if absent else 'sha256'}", entry.path, str(error))
        return
    try:
        decode_codebooks(data, spec.codebook_sizes, spec.code_dim, entry.path)
    except VerificationFailed as error:
        yield Problem("codebook_invalid", entry.path, str(error))


def _check_commits(store: Store) -> Iterator[Problem]:
    """The next job starts from the commit records, so a damaged one is worth knowing before."""

    def check(unit: str) -> Problem | None:
        try:
            read_commit(store, unit)
        except VerificationFailed as error:
            return Problem("commit_invalid", f"commits/{unit}", str(error))
        return None

    yield from (problem for problem in ordered_map(check, list_commits(store), threads=_THREADS) if problem)
