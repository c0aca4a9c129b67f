"""`asvr tokenize` and `asvr fit-codebook`: run a recipe's jobs one after the other and say what each came to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import plain, write_line, write_table
from pipeline.extras import needs
from pipeline.progress import ProgressLine, duration
from pipeline.recipe import load_recipe

if TYPE_CHECKING:
    from tokenize_stage.codebook_folder import FitReport
    from tokenize_stage.job import JobResult
    from tokenize_stage.progress import JobProgress


def tokenize_sets(recipe: Path, only: Sequence[str], overrides: Sequence[str], *, replace: bool) -> None:
    """Bring the token sets of `recipe` up to date, all of them or those in `only`. Raises what `run_job` raises."""
    sets = load_recipe(recipe, overrides).token_sets(only)
    from tokenize_stage.job import run_job

    for name, config in sets.items():
        with ProgressLine(name) as line, needs("tokenize"):
            result = run_job(config, replace=replace, progress=partial(_show, line))
        write_line(plain(f"{name}: {_outcome(result)} in {config.output}"))


def _show(line: ProgressLine, now: JobProgress) -> None:
    line.update(now.done, now.total, now.rejected)


def _outcome(result: JobResult) -> str:
    """The counts of a finished token set, and what this run did for them."""
    totals = result.manifest.totals
    counts = f"{totals.images:,} images, {totals.ok:,} ok, {totals.rejected:,} rejected"
    if totals.source_errors:
        counts += f", {totals.source_errors:,} source errors"
    if result.plan is None:
        return f"nothing to do; {counts}"
    copied = f", {result.copied:,} rows copied" if result.copied else ""
    return f"{result.encoded:,} images encoded{copied} in {duration(result.seconds)}; {counts}"


def fit_codebooks(recipe: Path, only: Sequence[str], overrides: Sequence[str]) -> None:
    """Fit the codebooks of `recipe`, all of them or those in `only`. Raises what `fit_codebook` raises."""
    codebooks = load_recipe(recipe, overrides).codebooks(only)
    for name, config in codebooks.items():
        with needs("tokenize"):
            from tokenize_stage.fit import fit_codebook

            with FitLines(name) as lines:
                report = fit_codebook(config, lines)
        write_line(plain(f"{name}: {_fitted(report)} in {config.output}"))
        write_table(
            [(depth, row.used, row.perplexity, row.relative_error) for depth, row in enumerate(report.depths)],
            ("depth", "codes used", "perplexity", "error left"),
        )


def _fitted(report: FitReport) -> str:
    rejected = f", {report.rejected:,} rejected" if report.rejected else ""
    return f"{len(report.depths)} depths fitted on {report.images:,} images{rejected} in {duration(report.seconds)}"


class FitLines:
    """One progress line for each part of a fit: reading features, then each depth."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.part = ""
        self.line: ProgressLine | None = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self.line is None or phase != self.part:
            self.close()
            noun = "images" if phase == "features" else "steps"
            self.part, self.line = phase, ProgressLine(f"{self.name}, {phase}", noun=noun)
        self.line.update(done, total)

    def close(self) -> None:
        if self.line is not None:
            self.line.close()

    def __enter__(self) -> FitLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
