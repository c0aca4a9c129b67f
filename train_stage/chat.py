"""Conversations as token ids with exact labels, in the two templates of LLaVA-1.5.

A conversation becomes a list of pieces of text, each wholly supervised or wholly not, and each is tokenized by
itself, so there is no border to search for afterwards (the "tokenization mismatch" of LLaVA's `train.py`).

`plain`      `<image>caption\n`, the caption and the line feed supervised; what the human says is dropped.
`vicuna_v1`  `SYSTEM USER: question ASSISTANT: answer</s>USER: ... ASSISTANT: ...</s>`; answers and the
             end-of-sequence token after each are supervised. `</s>` stands for the tokenizer's own.

Both as in haotian-liu/LLaVA `conversation.py` and `train.py` (`preprocess_plain`, `preprocess_v1`,
`preprocess_multimodal`): an image named once in a turn moves to its front, on a line of its own.
`chat_templates/*.jinja` say the same for `apply_chat_template`; a test holds them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from manifests.records import Turn
from train_stage.config import TemplateName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
"""How records mark the place of an image, whatever the tokenizer's own image token is called."""

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_ASSISTANT = "ASSISTANT:"
_END = "</s>"
"""Stands for the tokenizer's end-of-sequence token as the text before a piece."""


class BadSample(Exception):
    """A sample that cannot be trained on. `reason` is its class, the message says what is wrong with this one."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation. `after` is the text before it that may change how its first token is cut."""

    text: str
    supervised: bool
    after: str = ""
    ends_turn: bool = False


@dataclass(frozen=True)
class Encoded:
    """Token ids (int32) with one image token per image, and which of them are supervised (bool)."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]


def template_source(template: TemplateName, image_token: str = IMAGE) -> str:
    """The Jinja chat template that renders the prompts of `template`, for `apply_chat_template` and for export."""
    source = (Path(__file__).parent / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    return source.replace(IMAGE, image_token)


def pieces(template: TemplateName, conversation: Sequence[Turn], images: int) -> list[Piece]:
    """A record's `conversations` as pieces of text; `IMAGE` marks images, the end of a turn its eos token.

    Raises BadSample: `conversation` when turns do not alternate between human and gpt, `image_count` when the
    text does not mark as many images as the record names.
    """
    turns = _turns(conversation)
    marked = sum(text.count(IMAGE) for _, text in turns)
    if marked != images:
        raise BadSample("image_count", f"the text marks {marked} images with {IMAGE}, but the record names {images}")
    return _plain(turns) if template == "plain" else _vicuna(turns)


def _turns(conversation: Sequence[Turn]) -> list[tuple[str, str]]:
    """(speaker, text) of each turn, a leading gpt turn dropped as LLaVA does."""
    turns = [(str(turn.get("from")), turn.get("value")) for turn in conversation]
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    if not turns or len(turns) % 2:
        raise BadSample("conversation", "the turns are not pairs of human and gpt")
    for position, (speaker, text) in enumerate(turns):
        wanted = "gpt" if position % 2 else "human"
        if speaker != wanted:
            raise BadSample("conversation", f"turn {position + 1} is from {speaker!r} where {wanted!r} is due")
        if not isinstance(text, str):
            raise BadSample("conversation", f"turn {position + 1} has no text")
        if position % 2 and IMAGE in text:
            raise BadSample("conversation", f"turn {position + 1} is an answer and marks an image")
    return [(speaker, str(text)) for speaker, text in turns]


def _plain(turns: list[tuple[str, str]]) -> list[Piece]:
    if len(turns) != 2:
        raise BadSample(
            "conversation",
            "the plain template takes one question and one answer; longer conversations need template vicuna_v1",
        )
    images = IMAGE * turns[0][1].count(IMAGE)
    return [Piece(images, False), Piece(turns[1][1] + "\n", True, after=IMAGE if images else "")]


def _vicuna(turns: list[tuple[str, str]]) -> list[Piece]:
    made = []
    for position in range(0, len(turns), 2):
        question, answer = turns[position][1], turns[position + 1][1]
        if question.count(IMAGE) == 1:
            question = f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()
        question = f"USER: {question} {_ASSISTANT}"
        made.append(Piece(question, False, after=_END) if position else Piece(f"{SYSTEM} {question}", False))
        made.append(Piece(f" {answer}", True, after=_ASSISTANT, ends_turn=True))
    return made


class ChatEncoder:
    """Turns pieces into token ids; one tokenizer call for many conversations, since that is 10 times faster.

    A piece is encoded together with the text it follows (`after`), whose ids are then taken off again: that gives
    the very ids a whole prompt would have, with or without a dummy prefix (SentencePiece). Where the two grow
    together into one token, the piece is encoded alone. Only the first piece gets the tokenizer's
    beginning-of-sequence token, if it has the habit of adding one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token: str) -> None:
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(image_token))
        self.eos_token_id = int(tokenizer.eos_token_id)
        opening = list(tokenizer("")["input_ids"])
        self.prefix = opening[:1] if opening and opening[0] == tokenizer.bos_token_id else []
        self._after = {IMAGE: image_token, _ASSISTANT: _ASSISTANT, _END: str(tokenizer.eos_token), "": ""}
        self._after_ids = {mark: self._ids([text])[0] if text else [] for mark, text in self._after.items()}

    def encode(self, conversations: Sequence[Sequence[Piece]]) -> list[Encoded]:
        """Ids and supervision of each conversation, in order."""
        texts = [self._text(piece) for conversation in conversations for piece in conversation]
        found = iter(self._ids(texts))
        return [self._join(conversation, [next(found) for _ in conversation]) for conversation in conversations]

    def _text(self, piece: Piece) -> str:
        return self._after[piece.after] + piece.text.replace(IMAGE, self.image_token)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return found

    def _join(self, conversation: Sequence[Piece], encoded: list[list[int]]) -> Encoded:
        ids, supervised = list(self.prefix), [False] * len(self.prefix)
        for piece, with_context in zip(conversation, encoded, strict=True):
            own = self._without_context(piece, with_context)
            if piece.ends_turn:
                own = [*own, self.eos_token_id]
            ids += own
            supervised += [piece.supervised] * len(own)
        return Encoded(np.array(ids, dtype=np.int32), np.array(supervised, dtype=np.bool_))

    def _without_context(self, piece: Piece, with_context: list[int]) -> list[int]:
        context = self._after_ids[piece.after]
        if with_context[: len(context)] == context:
            return with_context[len(context) :]
        return self._ids([piece.text.replace(IMAGE, self.image_token)])[0]
