"""The end of the demo: the sheet of pictures beside their codes, and the lines that say what came of it."""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from manifests.decode import decode
from manifests.reader import open_manifest
from manifests.storage import Store
from pipeline.console import plain, write_line, write_table
from pipeline.demo.dataset import load_training_questions, prior_accuracy
from pipeline.demo.held_out import Result
from pipeline.demo.layout import Layout
from pipeline.demo.pictures import Row, draw_sheet
from pipeline.progress import duration

PICTURES = 12
"""Held-out images on the sheet."""

LINES = 4
"""Questions beside each of them."""


def draw_pictures(place: Layout, result: Result) -> None:
    """Write `place.pictures`: the first held-out images that were asked about, their codes and some answers."""
    opened = open_manifest(place.tokens)
    rows, columns = opened.tokenizer.grid
    asked: dict[str, list[str]] = {}
    for question, said, right in zip(result.questions, result.answers, result.correct, strict=True):
        verdict = "" if right else f" (wrong: {question.answer})"
        asked.setdefault(question.image, []).append(f"{question.question} {said or '(nothing)'}{verdict}")
    names = sorted(asked, key=lambda name: (-min(LINES, len(asked[name])), len(name), name))[:PICTURES]
    codes = opened.read_codes(names)
    sheet = draw_sheet(
        [
            Row(
                decode((place.images / name).read_bytes()),
                views_VPD[0].reshape(rows, columns, -1).astype(np.int64),
                [name, *asked[name][:LINES]],
            )
            for name, views_VPD in zip(names, codes, strict=True)
        ],
        opened.codebooks(),
    )
    encoded = io.BytesIO()
    sheet.save(encoded, format="PNG")
    Store.open(place.folder).write(place.pictures.name, encoded.getvalue())


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
        ("pictures", place.pictures, "beside their codes"),
    ]
    write_table([(f"  {name}", path, note) for name, path, note in where])
    write_line()
    write_line(f"  held-out accuracy  {result.accuracy:.3f}  on pictures that no training saw")
    write_line(f"  question prior     {prior:.3f}  the most common training answer to the same question")
    write_line(
        f"  same answers       {result.same:,} of {len(result.questions):,}  by the export and the model in memory"
    )
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
