"""Batched greedy answers are those one would get one by one, and the same before and after export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manifests.errors import InputError
from manifests.schema import Geometry
from train_stage import config as configs
from train_stage.build import build_model
from train_stage.chat import ChatEncoder
from train_stage.evaluate import Answer, Question, accuracy, answer_questions, load_exported, prompt
from train_stage.export import export_llava, make_processor
from train_stage.model import AsvrModel
from train_stage.templates import pieces, template_source
from train_stage.tokenizer import load_tokenizer

GEOMETRY = Geometry(mode="squash", size=28)
TEMPLATE = template_source("vicuna_v1")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., configs.ModelConfig]) -> AsvrModel:
    built = build_model(tiny_model(), (), {}, torch.float32)
    torch.manual_seed(7)
    for parameter in built.llava.parameters():  # large enough for answers that differ from picture to picture
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return built


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    folder = tmp_path_factory.mktemp("pictures")
    made: list[Question] = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        texts = ("what?", "how many of these are there, do you think?", "is it?")
        made += [Question(folder / f"{number}.png", text, "yes") for text in texts]
    return made[::2] + made[1::2]


def one_by_one(model: AsvrModel, tokenizer: object, questions: list[Question]) -> list[str]:
    """Plain generation from plain inputs: no batches, no padding, no shared features."""
    processor = make_processor(model, tokenizer, GEOMETRY, TEMPLATE)
    texts = []
    for question in questions:
        inputs = processor(
            images=Image.open(question.image), text=prompt(processor, question.question), return_tensors="pt"
        )
        out = model.llava.generate(**inputs, do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=0)
        texts.append(
            processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        )
    return texts


def test_batches_answer_as_single_questions_do_before_and_after_export(
    model: AsvrModel,
    questions: list[Question],
    tiny_model: Callable[..., configs.ModelConfig],
    tmp_path: Path,
) -> None:
    tokenizer = load_tokenizer(tiny_model())
    model.eval()
    expected = one_by_one(model, tokenizer, questions)
    assert len(set(expected)) > 4
    processor = make_processor(model, tokenizer, GEOMETRY, TEMPLATE)
    seen: list[tuple[int, int]] = []
    options = {"batch_size": 5, "max_new_tokens": 6}
    answers = answer_questions(
        model.llava, processor, questions, **options, progress=lambda done, of: seen.append((done, of))
    )
    assert [answer.text for answer in answers] == expected
    assert [answer.question for answer in answers] == questions
    assert seen == [(5, 12), (10, 12), (12, 12)]

    export_llava(model, tokenizer, GEOMETRY, tmp_path / "out", chat_template=TEMPLATE)
    loaded, loaded_processor = load_exported(tmp_path / "out")
    again = answer_questions(loaded, loaded_processor, questions, **options)
    assert [answer.text for answer in again] == expected


def test_a_prompt_has_the_ids_of_training(
    model: AsvrModel, questions: list[Question], tiny_model: Callable[..., configs.ModelConfig]
) -> None:
    tokenizer = load_tokenizer(tiny_model())
    processor = make_processor(model, tokenizer, GEOMETRY, TEMPLATE)
    encoder = ChatEncoder(tokenizer, "<image>")
    for question in questions:
        turns = [
            {"from": "human", "value": f"<image>\n{question.question}"},
            {"from": "gpt", "value": question.answer},
        ]
        (encoded,) = encoder.encode([pieces("vicuna_v1", turns, 1)])
        inputs = processor(images=Image.open(question.image), text=prompt(processor, question.question))
        ids = [int(i) for i in inputs["input_ids"][0]]
        at = ids.index(encoder.image_token_id)
        assert ids[:at] + ids[at + 15 :] == encoded.ids[~encoded.supervised].tolist()


def test_the_mode_of_the_model_is_given_back(
    model: AsvrModel, questions: list[Question], tiny_model: Callable[..., configs.ModelConfig]
) -> None:
    processor = make_processor(model, load_tokenizer(tiny_model()), GEOMETRY, TEMPLATE)
    model.llava.train()
    answer_questions(model.llava, processor, questions[:1], max_new_tokens=1)
    assert model.llava.training


@pytest.mark.parametrize(("text", "correct"), [("Yes", True), (" yes. ", True), ("yes it is", False), ("", False)])
def test_exact_match_but_for_case_and_space(text: str, correct: bool) -> None:
    assert Answer(Question(Path("a.png"), "?", "yes"), text).correct is correct


def test_accuracy() -> None:
    question = Question(Path("a.png"), "?", "yes")
    assert accuracy([Answer(question, "yes"), Answer(question, "no")]) == 0.5
    with pytest.raises(ValueError, match="no answers"):
        accuracy([])


def test_pictures_that_cannot_be_read_are_named(
    model: AsvrModel, tiny_model: Callable[..., configs.ModelConfig], tmp_path: Path
) -> None:
    processor = make_processor(model, load_tokenizer(tiny_model()), GEOMETRY, TEMPLATE)
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    for name in ("page.jpg", "nowhere.png"):
        with pytest.raises(InputError, match=name):
            answer_questions(model.llava, processor, [Question(tmp_path / name, "what?", "yes")])


def test_a_folder_without_an_export_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no exported model can be read"):
        load_exported(tmp_path)
