"""Ask an exported model about pictures. Needs torch, transformers and pillow; nothing of asvr.

    python ask.py run/export PICTURE "what color is the shape?"
    python ask.py run/export QUESTIONS.json IMAGE_FOLDER ANSWERS.json

QUESTIONS.json is a list of {"id", "image", "question"}; ANSWERS.json becomes {id: answer}.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

BATCH = 50
SECONDS_BETWEEN_LINES = 5


def load(folder: str) -> tuple[Any, Any]:
    """The model and its processor, as of any Hugging Face LLaVA."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder, backend="pil")


@torch.inference_mode()
def answer(model: Any, processor: Any, pictures: list[Image.Image], questions: list[str]) -> list[str]:
    """One greedy answer for each picture and question."""
    prompts = []
    for question in questions:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        prompts.append(processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
    inputs = processor(images=pictures, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    replies = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(replies, skip_special_tokens=True)]


def answer_file(folder: str, questions_path: str, image_folder: str, answers_path: str) -> None:
    """Answer every question of a file, with a line on standard error now and then."""
    model, processor = load(folder)
    questions = json.loads(Path(questions_path).read_text())
    answers: dict[str, str] = {}
    shown = 0.0
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        pictures = [Image.open(Path(image_folder) / asked["image"]).convert("RGB") for asked in batch]
        texts = answer(model, processor, pictures, [asked["question"] for asked in batch])
        answers.update((asked["id"], text) for asked, text in zip(batch, texts, strict=True))
        if time.monotonic() - shown > SECONDS_BETWEEN_LINES or len(answers) == len(questions):
            shown = time.monotonic()
            sys.stderr.write(f"exported model: {len(answers):,}/{len(questions):,} questions\n")
    draft = Path(f"{answers_path}.tmp")
    draft.write_text(json.dumps(answers, indent=1) + "\n")
    draft.replace(answers_path)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        picture = Image.open(sys.argv[2]).convert("RGB")
        sys.stdout.write(answer(*load(sys.argv[1]), [picture], [sys.argv[3]])[0] + "\n")
    elif len(sys.argv) == 5:
        answer_file(*sys.argv[1:])
    else:
        sys.exit(__doc__)
