"""The demo's data: the published easy-VQA set as LLaVA conversations beside an image folder.

What `write_dataset` makes:

    images/{train,test}/N.png    the set's own PNG files, byte for byte
    pretrain.json                one short caption for each training image (LLaVA's `plain` form)
    instruct.json                one conversation for each training image: all its questions, one per turn
    questions.json               every held-out question: {id, image, question, answer}
    SOURCES.txt                  where each file of the demo comes from, and its licence

A caption says only what the image's own questions and answers say. Each picture shows one shape, so a
colour or shape that a question establishes is the picture's.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from manifests.errors import InputError
from pipeline.demo.fetch import WHEELS, read_member, read_members
from pipeline.demo.folders import new_folder

Split = Literal["train", "test"]

TRAIN_IMAGES = 4000
TEST_IMAGES = 1000
COLOURS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})


@dataclass(frozen=True)
class Question:
    """One question about one image; `image` is the path below the image folder, as in the conversations."""

    id: str
    image: str
    question: str
    answer: str


def read_questions(archive: Path, split: Split, images: int) -> list[Question]:
    """The questions about the first `images` images of a split, in the order published.

    Raises: InputError when the list in the archive has another shape.
    """
    found: list[Question] = []
    for row in json.loads(read_member(archive, f"easy_vqa/data/{split}/questions.json")):
        match row:
            case [str(question), str(answer), int(image)]:
                if 0 <= image < images:
                    name = f"{split}/{image}.png"
                    found.append(Question(f"{split}-{len(found):05d}", name, question, answer))
            case _:
                raise InputError(f"{archive} holds the question {row!r}: only easy-vqa 1.0 can be read")
    return found


def by_image(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """The questions of each image, both in order of appearance."""
    grouped: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        grouped[question.image].append(question)
    return dict(grouped)


def instruct_record(image: str, questions: Sequence[Question]) -> dict[str, Any]:
    """All questions of an image as one LLaVA conversation; the first turn carries the image.

    The turns are shuffled, always in the same way: as published, every conversation opens with the `what` questions,
    so a model would meet a yes/no question only after having heard answers about the image.
    """
    turns = []
    for number, asked in enumerate(random.Random(image).sample(questions, len(questions))):
        mark = "<image>\n" if number == 0 else ""
        turns += [{"from": "human", "value": mark + asked.question}, {"from": "gpt", "value": asked.answer}]
    return {"id": image, "image": image, "conversations": turns}


def pretrain_record(image: str, questions: Sequence[Question]) -> dict[str, Any] | None:
    """The image and a caption, in LLaVA's `plain` form; None when its questions establish nothing."""
    caption = caption_of(questions)
    if caption is None:
        return None
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
    return {"id": image, "image": image, "conversations": turns}


def caption_of(questions: Sequence[Question]) -> str | None:
    """`a blue rectangle`, or as much of it as the questions and answers establish."""
    colours: set[str] = set()
    shapes: set[str] = set()
    for asked in questions:
        words = set(asked.question.rstrip("?").split())
        if asked.answer in ("yes", "no"):
            denied = bool(words & {"no", "not"})
            if (asked.answer == "yes") == denied:
                continue  # this question says what the picture does not show
        colours |= (words | {asked.answer}) & COLOURS
        shapes |= (words | {asked.answer}) & SHAPES
    if len(colours) > 1 or len(shapes) > 1:
        raise InputError(f"the questions about {questions[0].image} contradict each other: use easy-vqa 1.0")
    if not colours and not shapes:
        return None
    return " ".join(["a", *colours, *(shapes or {"shape"})])


def prior_answers(questions: Iterable[Question]) -> dict[str, str]:
    """For each question text, its most common answer: the best one can do without looking (ties: first seen)."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for asked in questions:
        counts[asked.question][asked.answer] += 1
    return {text: answers.most_common(1)[0][0] for text, answers in counts.items()}


def prior_accuracy(train: Iterable[Question], held_out: Sequence[Question]) -> float:
    """Share of held-out questions that the most common training answer to the same text gets right."""
    prior = prior_answers(train)
    return sum(prior.get(asked.question) == asked.answer for asked in held_out) / max(1, len(held_out))


def choose_questions(questions: Sequence[Question], count: int | None) -> list[Question]:
    """A fixed random choice of `count` questions, in published order; all of them for None."""
    if count is None or count >= len(questions):
        return list(questions)
    chosen = random.Random(0).sample(range(len(questions)), count)
    return [questions[index] for index in sorted(chosen)]


def split_images(images: int | None) -> tuple[int, int]:
    """(training, held-out) images for a demo on `images` images: four to one, as the whole set."""
    if images is None or images >= TRAIN_IMAGES + TEST_IMAGES:
        return TRAIN_IMAGES, TEST_IMAGES
    test = max(1, images // 5)
    return max(1, images - test), test


def write_dataset(archive: Path, folder: Path, images: int | None) -> None:
    """Write `folder` from the easy-vqa wheel: every file named in this module's docstring."""
    counts: dict[Split, int] = dict(zip(("train", "test"), split_images(images), strict=True))
    with new_folder(folder) as scratch:
        for split, count in counts.items():
            (scratch / "images" / split).mkdir(parents=True)
            members = (f"easy_vqa/data/{split}/images/{number}.png" for number in range(count))
            for number, (_, data) in enumerate(read_members(archive, members)):
                (scratch / "images" / split / f"{number}.png").write_bytes(data)
        train = by_image(read_questions(archive, "train", counts["train"]))
        captions = [record for name, asked in train.items() if (record := pretrain_record(name, asked))]
        _write_json(scratch / "pretrain.json", captions)
        _write_json(scratch / "instruct.json", [instruct_record(name, asked) for name, asked in train.items()])
        _write_json(scratch / "questions.json", [asdict(q) for q in read_questions(archive, "test", counts["test"])])
        sources = [f"{wheel.name} {wheel.version}  {wheel.licence}  sha256 {wheel.sha256}\n" for wheel in WHEELS]
        (scratch / "SOURCES.txt").write_text("".join(sources))


def _write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n")


def load_held_out(folder: Path) -> list[Question]:
    """The held-out questions that `write_dataset` left in `folder`."""
    return [Question(**row) for row in json.loads((folder / "questions.json").read_text())]


def load_training_questions(folder: Path) -> list[Question]:
    """The training questions, read back from the conversations that `write_dataset` left in `folder`."""
    found: list[Question] = []
    for record in json.loads((folder / "instruct.json").read_text()):
        turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        pairs = zip(turns[::2], turns[1::2], strict=True)
        for number, (asked, said) in enumerate(pairs):
            found.append(Question(f"{record['id']}-{number}", record["image"], asked, said))
    return found
