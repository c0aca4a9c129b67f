"""Questions about pictures that no training saw, answered twice: by the export alone, and by the model in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from manifests.errors import InputError, VerificationFailed
from manifests.hashes import file_sha256
from manifests.storage import Store
from pipeline.demo.dataset import Question, choose_questions, load_held_out
from pipeline.demo.layout import Layout
from pipeline.progress import ProgressLine

SHARE_OF_TIES = 0.001
"""The two may differ in answers whose two best tokens are equal up to rounding; more than so many is a fault."""


@dataclass(frozen=True)
class Result:
    """What the exported model answered. `same`: in how many answers the trained model in memory agrees."""

    questions: list[Question]
    answers: list[str]
    same: int

    @property
    def correct(self) -> list[bool]:
        return [said.lower() == asked.answer for asked, said in zip(self.questions, self.answers, strict=True)]

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / max(1, len(self.questions))


def answer_held_out(place: Layout, count: int | None) -> Result:
    """Answer the fixed choice of `count` held-out questions and keep the answers in `place.answers`.

    The export is read and run by `ask.py` in a process of its own, which imports nothing of this project.

    Raises: VerificationFailed when the export and the model it was made of do not give the same answers.
    """
    questions = choose_questions(load_held_out(place.data), count)
    weights = [file_sha256(path) for path in sorted(place.export.glob("model*.safetensors"))]
    kept = _read(place, questions, weights)
    if kept is not None:
        return kept
    exported = _ask_export(place, questions)
    trained = _ask_trained(place, questions)
    same = sum(one == other for one, other in zip(exported, trained, strict=True))
    if len(questions) - same > max(1, SHARE_OF_TIES * len(questions)):
        raise VerificationFailed(
            f"the model in {place.export} and the one it was exported from agree on {same:,} of {len(questions):,} "
            f"answers only: remove {place.export} and run the demo again"
        )
    result = Result(questions, exported, same)
    _write(place, result, weights)
    return result


def _ask_export(place: Layout, questions: Sequence[Question]) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "questions.json"), Path(scratch, "answers.json")
        asked.write_text(json.dumps([asdict(question) for question in questions]))
        command = [sys.executable, str(place.script), str(place.export), str(asked), str(place.images), str(answered)]
        if subprocess.run(command, check=False).returncode:
            raise InputError(f"{place.script} could not answer with {place.export}: its own message is above")
        answers = json.loads(answered.read_text())
    return [answers[question.id] for question in questions]


def _ask_trained(place: Layout, questions: Sequence[Question]) -> list[str]:
    from pipeline.recipe import load_recipe
    from train_stage import evaluate
    from train_stage.export import make_processor
    from train_stage.trained import load_trained

    trained = load_trained(load_recipe(place.recipe).train())
    processor = make_processor(trained.model, trained.tokenizer, trained.geometry, trained.chat_template)
    asked = [evaluate.Question(place.images / one.image, one.question, one.answer) for one in questions]
    with ProgressLine("model in memory", noun="questions") as line:
        answers = evaluate.answer_questions(trained.model.llava, processor, asked, progress=line.update)
    return [answer.text for answer in answers]


def _write(place: Layout, result: Result, weights: list[str]) -> None:
    pairs = zip(result.questions, result.answers, strict=True)
    rows = [{**asdict(asked), "said": said} for asked, said in pairs]
    document = {"accuracy": result.accuracy, "same": result.same, "weights": weights, "answers": rows}
    Store.open(place.folder).write(place.answers.name, (json.dumps(document, indent=1) + "\n").encode())


def _read(place: Layout, questions: Sequence[Question], weights: list[str]) -> Result | None:
    """The kept result, if it is that of these questions and these weights."""
    if not place.answers.exists():
        return None
    document = json.loads(place.answers.read_text())
    rows = document["answers"]
    if document["weights"] != weights or [row["id"] for row in rows] != [question.id for question in questions]:
        return None
    return Result(list(questions), [row["said"] for row in rows], document["same"])
