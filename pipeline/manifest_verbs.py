"""The verbs that work on the folder of a token set: `gc`, `retry`, `manifest merge|filter|forget`, `verify` with repairs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import RecipeError
from manifests.report import Problem, VerifyReport
from manifests.storage import Store
from pipeline.console import plain, write_json, write_line, write_table
from pipeline.extras import needs
from pipeline.job_line import show_job
from pipeline.progress import ProgressLine

if TYPE_CHECKING:
    from manifests.filter import Choice
    from manifests.schema import Manifest

SHOWN = 3
"""Images of a kind that are named."""

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def gc(out: str, *, older_than: str, keep_snapshots: int | None, dry_run: bool, as_json: bool) -> None:
    """Remove orphans and say which. Raises what `collect_garbage` raises."""
    from manifests.garbage import collect_garbage

    store = Store.open(out)
    report = collect_garbage(store, older_than=seconds(older_than), keep_snapshots=keep_snapshots, dry_run=dry_run)
    if as_json:
        removed = [{"path": orphan.path, "bytes": orphan.bytes} for orphan in report.removed]
        young = [orphan.path for orphan in report.young]
        write_json({"dry_run": dry_run, "removed": removed, "young": young, "snapshots": report.snapshots})
        return
    if report.removed:
        write_table([(orphan.path, orphan.bytes) for orphan in report.removed], ("file", "bytes"))
    verb = "would be removed" if dry_run else "removed"
    write_line(plain(f"{len(report.removed):,} files, {report.bytes:,} bytes {verb} from {store.location}"))
    write_line(f"{len(report.young):,} more are younger than {older_than}; {len(report.snapshots):,} snapshots stay")


def seconds(age: str) -> float:
    """`90m`, `24h`, `7d` in seconds; else `RecipeError`."""
    match = _AGE.fullmatch(age.strip())
    if not match:
        raise RecipeError(f"{age!r} is no age: write a number and s, m, h or d, for example 24h")
    return float(match[1]) * _SECONDS[match[2]]


def retry(out: str, reasons: Sequence[str], overrides: Sequence[str]) -> None:
    """Try rejects again and say how many became ok. Raises what `retry_rejects` raises."""
    store = Store.open(out)
    with needs("tokenize"):
        from tokenize_stage.retry_rejects import retry_rejects

        with ProgressLine(store.location) as line:
            report = retry_rejects(store, reasons, overrides, progress=partial(show_job, line))
    if not report.tried:
        write_line(plain(f"no rejects to try again in {store.location}"))
        return
    write_table(list(report.tried.items()), ("reason", "tried"))
    tried = sum(report.tried.values())
    write_line(plain(f"{report.recovered:,} of {tried:,} rejects are ok now in {store.location}"))


def merge(inputs: Sequence[str], output: str) -> None:
    """Make one set of several. Raises what `merge_sets` raises."""
    from manifests.merge import merge_sets

    store = Store.open(output)
    with ProgressLine(store.location, noun="units") as line:
        report = merge_sets(inputs, store, progress=line.update)
    write_line(plain(f"{_counts(report.manifest)} in {store.location}"))
    if report.duplicates:
        write_line(f"{report.duplicates:,} images stood in several sets and were kept once")


def filter_(out: str, output: str, *, ids: Path | None, exclude: Path | None, condition: str | None) -> None:
    """Make a smaller set. Raises what `filter_set` raises."""
    from manifests.filter import filter_set

    choice = _choice(ids, exclude, condition)
    store = Store.open(output)
    with ProgressLine(store.location, noun="units") as line:
        report = filter_set(out, choice, store, progress=line.update)
    write_line(plain(f"{_counts(report.manifest)} in {store.location}"))
    if report.absent:
        write_line(plain(f"{report.absent:,} of the ids are not in {out}"))


def _choice(ids: Path | None, exclude: Path | None, condition: str | None) -> Choice:
    from manifests.filter import Choice
    from manifests.id_files import read_ids

    if ids is None and exclude is None and condition is None:
        raise RecipeError("nothing says what to keep: give --ids, --exclude-ids or --where")
    return Choice(read_ids(ids) if ids else None, read_ids(exclude) if exclude else None, condition)


def forget(out: str, image_ids: Sequence[str], ids: Path | None, *, purge: bool) -> None:
    """Take images out of a set for good. Raises what `forget_images` raises."""
    from manifests.forget import forget_images
    from manifests.id_files import read_ids

    store = Store.open(out)
    names = [*image_ids, *(read_ids(ids).to_pylist() if ids else [])]
    report = forget_images(store, names, purge=purge)
    write_line(
        plain(
            f"{report.forgotten:,} images forgotten in {report.units:,} rewritten units of {store.location}; "
            "the tokenize job will not take them in again"
        )
    )
    if report.absent:
        write_line(f"{report.absent:,} ids were not in the set (any more); they are remembered all the same")
    if purge:
        write_line("older snapshots and shards that held any of them are deleted; runs pinned to those cannot resume")
    elif report.snapshots:
        write_line(
            plain(
                f"{len(report.snapshots):,} older snapshots still show them: asvr gc {out} --keep-snapshots 1 removes those "
                "once they are old enough, the same command with --purge removes them now"
            )
        )
    write_line("not touched: the source, copies of the set, and sets that were merged or filtered from it")


def verify(out: str, *, deep: bool, sample: int, seed: int, rebuild: bool, like: str | None) -> VerifyReport:
    """Check a set, after restoring its manifest if `rebuild`, and compare `sample` images with what they give now.

    What was restored, lost or compared stands in the report's notes. Raises what the three raise.
    """
    from manifests.verify import verify as check

    notes = _rebuild(out, like) if rebuild else []
    with ProgressLine(out, noun="shards") as line:
        report = check(out, deep=deep, progress=line.update)
    problems = report.problems
    if sample and problems:
        notes.append("nothing was recomputed, because the set is damaged")
    elif sample:
        found, more = _recompute(out, sample, seed)
        problems, notes = [*problems, *found], [*notes, *more]
    return replace(report, problems=problems, notes=[*report.notes, *notes])


def _rebuild(out: str, like: str | None) -> list[str]:
    from manifests.rebuild import rebuild

    report = rebuild(Store.open(out), like)
    written = f"the manifest was rebuilt, and {len(report.rebuilt):,} commit records were written anew"
    return [written, *(f"lost: {sentence}" for sentence in report.lost)]


def _recompute(out: str, sample: int, seed: int) -> tuple[list[Problem], list[str]]:
    with needs("tokenize"):
        from tokenize_stage.recompute import recompute

        with ProgressLine(f"{out}, recompute") as line:
            report = recompute(Store.open(out), sample, seed=seed, progress=line.update)
    flips = f"{report.flips:,} of {report.positions:,} positions flipped by rounding"
    if report.flips:
        flips += f" (largest shift {report.largest_shift:.2g})"
    counts = f"recomputed {report.compared:,} of {report.sampled:,} sampled images: {report.equal:,} equal, {flips}"
    left_out = [f"not compared, its bytes are others now: {name}" for name in report.changed]
    left_out += [f"not compared, it cannot be read: {text}" for text in report.unreadable]
    more = [f"and {len(left_out) - SHOWN:,} more images that were not compared"] if len(left_out) > SHOWN else []
    return report.problems, [counts, *left_out[:SHOWN], *more]


def _counts(manifest: Manifest) -> str:
    totals = manifest.totals
    return f"{totals.images:,} images, {totals.ok:,} ok, {totals.rejected:,} rejected"
