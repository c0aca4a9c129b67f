"""`asvr demo`: from published packages to a model that answers questions about pictures it never saw.

Each step is what a user would run, in the same folder with the same recipe. A step that is done is not done
again, so the same command resumes an interrupted demo.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from manifests.errors import EXIT_CODES
from pipeline.console import plain, write_line
from pipeline.demo.layout import Layout
from pipeline.extras import require
from pipeline.progress import duration

DEFAULT_FOLDER = Path("demo_run")
DEFAULT_QUESTIONS = 2000
FEWEST_IMAGES = 60
"""With fewer there are not enough positions to fit the demo's codebook on."""

STEPS = 7


class StepError(Exception):
    """A step that is a process of its own ended with `code`, having said why."""

    def __init__(self, code: int) -> None:
        super().__init__(EXIT_CODES.get(code, f"exit code {code}"))
        self.code = code


class StepClock:
    """Announces the steps one after the other and keeps how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str, command: str = "") -> Iterator[None]:
        """Run the block as the next step; `command` is what a user would type for it."""
        write_line()
        write_line(f"[{len(self.seconds) + 1}/{STEPS}] {title}")
        if command:
            write_line(plain(f"$ {command}"))
        began = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - began
        write_line(f"done in {duration(self.seconds[title])}")


def run_demo(folder: Path, *, images: int | None = None, questions: int | None = DEFAULT_QUESTIONS) -> None:
    """Run every step that `folder` does not hold yet, and print what came of it.

    Args:
        images: how many of the 5,000 images to use, a fifth of them held out; all of them for None.
        questions: how many held-out questions to answer, always the same ones; all of them for None.

    Raises: AsvrError of whichever step cannot be done, StepError when the training processes ended otherwise.
    """
    require("demo")
    _quiet_libraries()
    from pipeline.demo import held_out, prepare, report
    from pipeline.token_sets import Choice, tokenize_sets

    place = Layout(folder)
    clock = StepClock()
    with clock.step("images, encoder and vocabulary from published packages"):
        prepare.prepare(place, images)
    with clock.step("fit the codebook", f"asvr fit-codebook {place.recipe}"):
        _fit(place)
    with clock.step("tokenize the images", f"asvr tokenize {place.recipe}"):
        tokenize_sets(Choice(place.recipe))
    with clock.step("train two phases", f"asvr train {place.recipe}"):
        _train(place)
    with clock.step("export", f"asvr export {place.run}"):
        _export(place)
    with clock.step("answer held-out questions"):
        result = held_out.answer_held_out(place, questions)
    with clock.step("make a page to look at", f"asvr report {place.run}"):
        report.write_page(place, result)
    report.summarise(place, result, clock.seconds)


def _quiet_libraries() -> None:
    """No bars and notices of libraries between the demo's own lines, here and in the processes it starts."""
    from pipeline.launch import count_gpus

    if not count_gpus(dict(os.environ)):  # DeepSpeed warns of it wherever transformers imports it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _fit(place: Layout) -> None:
    """A codebook that is there is kept: fitting again would only change the codes of everything after it."""
    from pipeline.token_sets import fit_codebooks

    if (place.codebook / "codebook.json").exists():
        write_line("nothing to do")
    else:
        fit_codebooks(place.recipe, (), ())


def _train(place: Layout) -> None:
    from pipeline import launch
    from pipeline.recipe import load_recipe

    code = launch.train(load_recipe(place.recipe).train())
    if code:
        raise StepError(code)


def _export(place: Layout) -> None:
    """Export unless the export there is younger than every checkpoint."""
    from pipeline import launch

    exported = place.export / "config.json"
    checkpoints = place.run.glob("*/step_*/COMPLETE.json")
    if exported.exists() and all(path.stat().st_mtime < exported.stat().st_mtime for path in checkpoints):
        write_line("nothing to do")
    else:
        launch.export(place.run, place.export)


def main(arguments: Sequence[str]) -> int:
    """`asvr demo ARGUMENTS`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="asvr demo", description="Run the whole road on real data, on the CPU.")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--images", type=_image_count, metavar="N", help="use N of the 5,000 images (default: all)")
    parser.add_argument(
        "--questions",
        type=_question_count,
        default=DEFAULT_QUESTIONS,
        metavar="N",
        help="answer N of the held-out questions, or `all` 9,673 (default: %(default)s)",
    )
    chosen = parser.parse_args(list(arguments))
    try:
        run_demo(chosen.out, images=chosen.images, questions=chosen.questions)
    except StepError as failure:
        return failure.code
    return 0


def _image_count(text: str) -> int:
    count = int(text)
    if count < FEWEST_IMAGES:
        raise argparse.ArgumentTypeError(f"the demo needs at least {FEWEST_IMAGES} images")
    return count


def _question_count(text: str) -> int | None:
    if text == "all":
        return None
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("at least one question")
    return count
