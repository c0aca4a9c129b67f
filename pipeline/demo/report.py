"""The end of the demo: the page to look at, and the lines that say what came of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from manifests.reader import open_manifest
from manifests.storage import Store
from pipeline.console import plain, write_line, write_table
from pipeline.demo.dataset import load_training_questions, prior_accuracy
from pipeline.demo.held_out import Result
from pipeline.demo.layout import Layout
from pipeline.progress import ProgressLine, duration
from pipeline.report.build import write_report
from pipeline.report.runs import ANSWERS

PICTURES = 200
"""Images on the page, those that were asked about first."""

ENOUGH_IMAGES = 1000
"""With fewer the summary says that a low accuracy is no fault."""


def write_page(place: Layout, result: Result) -> None:
    """Write `place.report`, what `asvr report` says of the run; the answers go where it looks for them."""
    rows = [
        {"image": asked.image, "question": asked.question, "expected": asked.answer, "answer": said, "correct": right}
        for asked, said, right in zip(result.questions, result.answers, result.correct, strict=True)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Store.open(place.run).write(ANSWERS.as_posix(), lines.encode())
    with ProgressLine("report") as line:
        write_report(str(place.run), images=PICTURES, to=place.report, progress=line.update)


def summarise(place: Layout, result: Result, seconds: Mapping[str, float]) -> None:
    """Print where everything is, how good the answers are and what to do next; the same goes to `place.summary`."""
    opened = open_manifest(place.tokens)
    manifest = opened.manifest
    spec = opened.tokenizer
    prior = prior_accuracy(load_training_questions(place.data), result.questions)
    images = len({question.image for question in result.questions})
    summary = {
        "accuracy": result.accuracy,
        "question_prior": prior,
        "questions": len(result.questions),
        "same_answers_from_export": result.same,
        "seconds": {title: round(value, 1) for title, value in seconds.items()},
    }
    Store.open(place.folder).write(place.summary.name, (json.dumps(summary, indent=1) + "\n").encode())
    write_line()
    write_line(f"The demo is done, in {duration(sum(seconds.values()))}.")
    write_line()
    where = [
        ("recipe", place.recipe, "of every step above"),
        ("images", place.images, f"{manifest.totals.images:,}, with conversations beside them"),
        ("codebook", place.codebook, f"{spec.depth} depths of {spec.codebook_sizes[0]:,} vectors"),
        ("codes", place.tokens / "manifest.json", f"{spec.positions} positions x {spec.depth} codes an image"),
        ("checkpoints", place.run, "with a metrics.jsonl for each phase"),
        ("model", place.export, "a plain Hugging Face LLaVA, and visual_head.safetensors"),
        ("answers", place.answers, f"to {len(result.questions):,} questions about {images:,} images"),
        ("report", place.report, "to look at: curves, answers, pictures beside their codes"),
    ]
    write_table([(f"  {name}", path, note) for name, path, note in where])
    write_line()
    write_line(f"  held-out accuracy  {result.accuracy:.3f}  on pictures that no training saw")
    write_line(f"  question prior     {prior:.3f}  the most common training answer to the same question")
    write_line(
        f"  same answers       {result.same:,} of {len(result.questions):,}  by the export and the model in memory"
    )
    if manifest.totals.images < ENOUGH_IMAGES:
        write_line("  So few images teach a model few answers; without --images the demo takes all 5,000.")
    write_line()
    write_line("Next:")
    for note, command in _next_commands(place, result):
        write_line(plain(f"  # {note}"))
        write_line(plain(f"  {command}"))


def _next_commands(place: Layout, result: Result) -> list[tuple[str, str]]:
    """The three commands a user would want now."""
    scripts = _short(Path(sys.executable).parent)
    asvr, python = str(scripts / "asvr"), str(scripts / Path(sys.executable).name)
    first = result.questions[0]
    ask = [python, str(place.script), str(place.export), str(place.images / first.image), first.question]
    compare = [asvr, "train", str(place.recipe), "--set", f"train.output={place.run.name}_text_only"]
    for phase in ("pretrain", "instruct"):
        compare += ["--set", f"train.phases.{phase}.objective={{kind: none}}"]
    return [
        ("ask about a picture, with nothing but transformers", shlex.join(ask)),
        ("check every shard against its manifest", shlex.join([asvr, "verify", str(place.tokens)])),
        ("train once more without the visual loss, for comparison", shlex.join(compare)),
    ]


def _short(path: Path) -> Path:
    """The path as one would type it here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
