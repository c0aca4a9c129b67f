"""Exact-match question answering by batched greedy generation, with plain Hugging Face classes.

The same function answers for a model in memory and for one loaded from its exported folder.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from manifests.decode import Reject, decode
from manifests.errors import InputError

log = logging.getLogger(__name__)

Llava: TypeAlias = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration
Processor: TypeAlias = LlavaProcessor | LlavaNextProcessor

Progress = Callable[[int, int], None]
"""Called with (questions answered, questions in all)."""


@dataclass(frozen=True)
class Question:
    """A question about a picture and the answer that counts as right."""

    image: Path
    question: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """What the model said to a question. `correct`: equal to the expected answer but for case and outer space."""

    question: Question
    text: str

    @property
    def correct(self) -> bool:
        return normalise(self.text) == normalise(self.question.answer)


def normalise(text: str) -> str:
    """Lower case, without space or a full stop at the ends."""
    return text.strip().rstrip(".").strip().lower()


def accuracy(answers: Sequence[Answer]) -> float:
    """Share of correct answers; ValueError when there are none."""
    if not answers:
        raise ValueError("the accuracy of no answers is not defined")
    return sum(answer.correct for answer in answers) / len(answers)


def load_exported(folder: Path, *, device: str = "cpu") -> tuple[Llava, Processor]:
    """Model (in the dtype of its file) and processor of an exported folder, with Transformers alone.

    Raises:
        InputError: the folder holds no LLaVA that Transformers can read.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(device).eval()
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"no exported model can be read from {folder} ({first_line}); export one first") from error
    return model, processor


@torch.inference_mode()
def answer_questions(
    model: Llava,
    processor: Processor,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: Progress | None = None,
) -> list[Answer]:
    """Greedy answers, in the order of `questions`; each question is its own conversation.

    An answer ends with one of the tokens that `model.generation_config` names, or after `max_new_tokens`.
    Questions about one picture stand side by side, so that the tower sees it once a batch; prompts of unequal length
    are padded on the left. How questions fall into batches changes the answers by no more than rounding.

    Raises:
        InputError: a picture that cannot be read.
    """
    was_training = model.training
    model.eval()
    prompts = [prompt(processor, question.question) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: (str(questions[i].image), len(prompts[i])))
    texts: dict[int, str] = {}
    started = time.monotonic()
    read = lru_cache(maxsize=batch_size)(read_picture)
    for chosen in _batches(order, batch_size):
        images = [questions[i].image for i in chosen]
        inputs = _inputs(model, processor, [prompts[i] for i in chosen], images, [read(image) for image in images])
        replies = _generate(model, processor, inputs, max_new_tokens)
        texts.update(zip(chosen, replies, strict=True))
        if progress is not None:
            progress(len(texts), len(questions))
    model.train(was_training)
    log.info("%d questions answered in %.1f s", len(questions), time.monotonic() - started)
    return [Answer(question, texts[i]) for i, question in enumerate(questions)]


def prompt(processor: Processor, question: str) -> str:
    """The question about one picture as the processor's chat template puts it, up to where the answer begins."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text: str = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    return text


def read_picture(path: Path) -> Image.Image:
    """The picture as training sees it: `manifests.decode` settles orientation, alpha and colour."""
    try:
        return Image.fromarray(decode(path.read_bytes()))
    except OSError as error:
        raise InputError(f"the picture {path} cannot be read ({error.strerror})") from error
    except Reject as reject:
        raise InputError(f"the picture {path} cannot be decoded ({reject})") from reject


def _inputs(
    model: Llava,
    processor: Processor,
    prompts: list[str],
    images: list[Path],
    pictures: list[Image.Image],
) -> dict[str, Tensor]:
    """`inputs_embeds` (B, L, H) and `attention_mask` (B, L) of a batch; the tower sees each distinct picture once."""
    # As Transformers' own chat pipeline: a template that writes the first token itself is not given a second one.
    opening = processor.tokenizer.bos_token
    add_special_tokens = opening is None or not prompts[0].startswith(opening)
    inputs = processor(
        images=pictures,
        text=prompts,
        padding=True,
        padding_side="left",
        add_special_tokens=add_special_tokens,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    distinct = list(dict.fromkeys(images))
    # `pixel_values`, and for a LLaVA-NeXT `image_sizes`, of each distinct picture
    first = [images.index(image) for image in distinct]
    pictures_only = {name: inputs[name][first] for name in processor.image_processor.model_input_names}
    features = model.get_image_features(**pictures_only).pooler_output
    features_NH = torch.cat([features[distinct.index(image)] for image in images])
    embeds_BLH = model.get_input_embeddings()(inputs["input_ids"])
    at_image = (inputs["input_ids"] == model.config.image_token_id).unsqueeze(-1)
    embeds_BLH = embeds_BLH.masked_scatter(at_image, features_NH.to(embeds_BLH.dtype))
    return {"inputs_embeds": embeds_BLH, "attention_mask": inputs["attention_mask"]}


def _generate(model: Llava, processor: Processor, inputs: dict[str, Tensor], max_new_tokens: int) -> list[str]:
    tokenizer = processor.tokenizer
    new_tokens = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    decoded = tokenizer.batch_decode(new_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in decoded]


def _batches(order: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield list(order[start : start + size])
