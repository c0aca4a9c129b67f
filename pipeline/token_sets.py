"""`asvr tokenize` and `asvr fit-codebook`: run a recipe's jobs one after the other and say what each came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import plain, write_line, write_table
from pipeline.extras import needs
from pipeline.job_line import show_job
from pipeline.progress import ProgressLine, duration
from pipeline.recipe import load_recipe

if TYPE_CHECKING:
    from tokenize_stage.codebook_folder import FitReport
    from tokenize_stage.config import TokenSetConfig
    from tokenize_stage.job import JobResult
    from tokenize_stage.trial import Trial


@dataclass(frozen=True)
class Choice:
    """Which token sets of which recipe, and the two switches that every way of running them has."""

    recipe: Path
    only: Sequence[str] = ()
    overrides: Sequence[str] = ()
    replace: bool = False
    refresh: bool = False

    def sets(self) -> dict[str, TokenSetConfig]:
        """The chosen sets, in the recipe's order. Raises `RecipeError`."""
        return load_recipe(self.recipe, self.overrides).token_sets(self.only)


def tokenize_sets(choice: Choice) -> None:
    """Bring the token sets up to date. Raises what `run_job` raises."""
    sets = choice.sets()
    from tokenize_stage.job import run_job

    for name, config in sets.items():
        with ProgressLine(name) as line, needs("tokenize"):
            result = run_job(config, replace=choice.replace, refresh=choice.refresh, progress=partial(show_job, line))
        write_line(plain(f"{name}: {_outcome(result)} in {config.output}"))


def try_sets(choice: Choice, images: int) -> None:
    """A trial run of about `images` images of each set. Raises what `try_job` raises."""
    sets = choice.sets()
    from tokenize_stage.job import try_job

    for name, config in sets.items():
        with ProgressLine(name) as line, needs("tokenize"):
            trial = try_job(
                config, images, replace=choice.replace, refresh=choice.refresh, progress=partial(show_job, line)
            )
        for text in _measured(trial) if trial else ["nothing to do"]:
            write_line(plain(f"{name}: {text}"))


def preview_sets(choice: Choice) -> None:
    """Say what would be done and why. Raises what `preview_job` raises, and `BudgetExceeded` as a run would."""
    sets = choice.sets()
    from tokenize_stage.announce import plan_lines
    from tokenize_stage.job import JobResult, preview_job

    for name, config in sets.items():
        with needs("tokenize"):
            found = preview_job(config, replace=choice.replace, refresh=choice.refresh)
        if isinstance(found, JobResult):
            write_line(plain(f"{name}: {_outcome(found)} in {config.output}"))
            continue
        for text in plan_lines(found):
            write_line(plain(f"{name}: {text}"))
        found.budget.check()


def _measured(trial: Trial) -> list[str]:
    """What a trial says of the whole."""
    work, rejected = trial.work, trial.work.rejects.total()
    workers = f"{len(work.workers)} workers" if len(work.workers) > 1 else "1 worker"
    warm = "warm" if trial.warm else "start-up included: too few images to tell it apart"
    reasons = ", ".join(f"{reason} {count}" for reason, count in work.rejects.most_common())
    lines = [
        f"trial of {work.images:,} images in {duration(trial.seconds)}: {trial.rate:,.1f} images/s with {workers} ({warm}), "
        f"{work.bytes / max(work.rows, 1) / 1e3:,.1f} kB an image, {rejected:,} rejected{f' ({reasons})' if reasons else ''}"
    ]
    if trial.left:
        lines.append(
            f"at that rate the {trial.left:,} images that are left take {duration(trial.seconds_left)}; "
            f"the whole set of {trial.total:,} images comes to about {trial.total_bytes / 1e9:,.2f} GB"
        )
    lines.append("what was tokenized is kept; run asvr tokenize without --limit to go on and finish the set")
    return lines


def _outcome(result: JobResult) -> str:
    """The counts of a finished token set, and what this run did for them."""
    totals = result.manifest.totals
    counts = f"{totals.images:,} images, {totals.ok:,} ok, {totals.rejected:,} rejected"
    if totals.source_errors:
        counts += f", {totals.source_errors:,} source errors"
    if result.plan is None:
        return f"nothing to do; {counts}{f'; {result.listing_note}' if result.listing_note else ''}"
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
