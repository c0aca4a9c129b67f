"""Conversations as token ids with exact labels.

A conversation is a list of pieces of text, each wholly supervised or wholly not (`train_stage.templates`), and each
is tokenized by itself, so there is no border to search for afterwards (the "tokenization mismatch" of LLaVA's
`train.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from manifests.errors import InputError
from manifests.messages import IMAGE
from manifests.records import Turn
from train_stage.config import TemplateName
from train_stage.templates import BadSample, Piece, pieces, template_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IMAGE", "BadSample", "ChatEncoder", "Encoded", "Piece"]

_LAST_WORD = re.compile(r"\S{0,64}\s*\Z")


@dataclass(frozen=True)
class Encoded:
    """Token ids (int32) with one image token per image, and which of them are supervised (bool)."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]


class ChatEncoder:
    """Turns conversations into token ids; one tokenizer call for many of them, since that is 10 times faster.

    A piece is encoded together with the last word of the piece before it, whose ids are then taken off again: that
    gives the very ids a whole prompt would have, with or without a dummy prefix (SentencePiece). Where the two grow
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

    def pieces(self, template: TemplateName, conversation: Sequence[Turn], images: int) -> list[Piece]:
        """`templates.pieces` with this tokenizer's own template where `template` is `tokenizer`.

        Raises BadSample as that does, and InputError when the tokenizer has no template of its own.
        """
        if template == "tokenizer" and not self.tokenizer.chat_template:
            raise InputError(
                "the tokenizer has no chat template of its own: set the phase's template to one of the shipped ones"
            )
        return pieces(template, conversation, images, self._render, str(self.tokenizer.eos_token))

    def chat_template(self, template: TemplateName) -> str:
        """The Jinja source that renders the prompts of `template`, with this tokenizer's image token."""
        own = str(self.tokenizer.chat_template) if template == "tokenizer" else ""
        return template_source(template, self.image_token) + own

    def stop_tokens(self, template: TemplateName) -> list[int]:
        """Ids that end an answer of `template`: the tokenizer's end token, and the template's own end of turn if it has one.

        A template's own is the last added token of what it writes after an answer (`<|eot_id|>`, `<|im_end|>`). One that
        the tokenizer does not know as a token is several, of which none ends anything.
        """
        talk: list[Turn] = [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]
        (encoded,) = self.encode([self.pieces(template, talk, 0)])
        written = encoded.ids[encoded.supervised].tolist()
        own = [token for token in written if token in self.tokenizer.added_tokens_decoder]
        return list(dict.fromkeys([self.eos_token_id, *own[-1:]]))

    def encode(self, conversations: Sequence[Sequence[Piece]]) -> list[Encoded]:
        """Ids and supervision of each conversation, in order."""
        befores = [self._before(conversation) for conversation in conversations]
        texts = [
            before + self._text(piece)
            for conversation, own in zip(conversations, befores, strict=True)
            for piece, before in zip(conversation, own, strict=True)
        ]
        distinct = sorted({before for own in befores for before in own})
        context = dict(zip(distinct, self._ids(distinct), strict=True))
        found = iter(self._ids(texts))
        return [
            self._join(conversation, [context[before] for before in own], [next(found) for _ in conversation])
            for conversation, own in zip(conversations, befores, strict=True)
        ]

    def _text(self, piece: Piece) -> str:
        return piece.text.replace(IMAGE, self.image_token)

    def _before(self, conversation: Sequence[Piece]) -> list[str]:
        """For each piece the text before it that may change how its first token is cut."""
        befores = [""]
        for piece in conversation[:-1]:
            if piece.ends_turn:
                befores.append(str(self.tokenizer.eos_token))
            else:
                end = _LAST_WORD.search(self._text(piece))
                befores.append(end.group() if end else "")
        return befores[: len(conversation)]

    def _render(self, messages: list[dict[str, str]], prompt: bool) -> str:
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        # Where the tokenizer adds this token itself, `_join` does.
        return text.removeprefix(str(self.tokenizer.bos_token)) if self.prefix else text

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return found

    def _join(
        self, conversation: Sequence[Piece], contexts: Sequence[list[int]], encoded: Sequence[list[int]]
    ) -> Encoded:
        ids, supervised = list(self.prefix), [False] * len(self.prefix)
        for piece, context, with_context in zip(conversation, contexts, encoded, strict=True):
            if with_context[: len(context)] == context:
                own = with_context[len(context) :]
            else:
                own = self._ids([self._text(piece)])[0]
            if piece.ends_turn:
                own = [*own, self.eos_token_id]
            ids += own
            supervised += [piece.supervised] * len(own)
        return Encoded(np.array(ids, dtype=np.int32), np.array(supervised, dtype=np.bool_))
