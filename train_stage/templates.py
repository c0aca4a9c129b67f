"""Chat templates: a conversation as pieces of text, each wholly supervised or wholly not.

| name        | prompt of one exchange, and what is supervised in it                                          |
|-------------|-----------------------------------------------------------------------------------------------|
| `plain`     | `<image>` + **caption, line feed**; what the human says is dropped (LLaVA's alignment phase)   |
| `vicuna_v1` | `SYSTEM USER: question ASSISTANT:` + ** answer, end token**                                   |
| `mistral`   | `[INST] question [/INST]` + ** answer , end token** (LLaVA's `mistral_instruct`)              |
| `llama3`    | headers and `<|eot_id|>` of Llama 3 with LLaVA-NeXT's system text; **answer, `<|eot_id|>`**   |
| `qwen2`     | ChatML, `You are a helpful assistant.`; **answer, `<|im_end|>`**                              |
| `tokenizer` | whatever the tokenizer's own chat template renders; **the answer to its end token**           |

After haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT, `conversation.py` and the `preprocess*` functions of `train.py`: an
image named once in a turn moves to its front, on a line of its own. `chat_templates/*.jinja` say the same for
`apply_chat_template`; a test holds them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from manifests.messages import IMAGE
from manifests.records import Turn
from train_stage.config import TemplateName

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_LLAMA3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


class BadSample(Exception):
    """A sample that cannot be trained on. `reason` is its class, the message says what is wrong with this one."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation; `ends_turn` puts the tokenizer's end-of-sequence token after it."""

    text: str
    supervised: bool
    ends_turn: bool = False


@dataclass(frozen=True)
class _Format:
    """How a template writes a conversation. `{}` is the system text, question or answer.

    `end` closes an answer and is supervised; None stands for the tokenizer's end-of-sequence token. `between` comes
    after it, before the next question.
    """

    system_text: str
    system: str
    question: str
    answer: str
    end: str | None = None
    between: str = ""


_FORMATS = {
    "vicuna_v1": _Format(SYSTEM, "{} ", "USER: {} ASSISTANT:", " {}"),
    "mistral": _Format("", "<<SYS>>\n{}\n<</SYS>>\n\n", "[INST] {} [/INST]", " {} "),
    "llama3": _Format(
        _LLAMA3_SYSTEM,
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "{}",
        "<|eot_id|>",
    ),
    "qwen2": _Format(
        "You are a helpful assistant.",
        "<|im_start|>system\n{}<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "{}",
        "<|im_end|>",
        "\n",
    ),
}

_SYSTEM_INSIDE = {"mistral"}
"""Templates that put the system text into the first question."""

Render = Callable[[list[dict[str, str]], bool], str]
"""The tokenizer's own template: messages and whether the prompt of an answer is asked for, to text."""


@dataclass(frozen=True)
class Talk:
    """A checked conversation: questions and answers in pairs, and the record's own system text if it has one."""

    system: str | None
    pairs: list[tuple[str, str]]


def template_source(template: TemplateName, image_token: str = IMAGE) -> str:
    """The Jinja source of a template, for `apply_chat_template` and for export; of `tokenizer`, what goes before its own."""
    source = (Path(__file__).parent / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    return source.replace(IMAGE, image_token)


def pieces(
    template: TemplateName, conversation: Sequence[Turn], images: int, render: Render | None = None, end: str = ""
) -> list[Piece]:
    """A record's `conversations` as pieces of text in which `IMAGE` marks images.

    `render` and the text of the tokenizer's end token `end` are what template `tokenizer` needs. Raises BadSample:
    `conversation` when turns do not alternate between human and gpt, `image_count` when the text does not mark as
    many images as the record names.
    """
    talk = read_talk(conversation)
    marked = sum(question.count(IMAGE) for question, _ in talk.pairs)
    if marked != images:
        raise BadSample("image_count", f"the text marks {marked} images with {IMAGE}, but the record names {images}")
    if template == "plain":
        return _plain(talk)
    talk = Talk(talk.system, [(_image_first(question), answer) for question, answer in talk.pairs])
    if template == "tokenizer":
        if render is None:
            raise ValueError("template tokenizer needs the tokenizer's own template")
        return _rendered(talk, render, end)
    return _formatted(talk, _FORMATS[template], system_inside=template in _SYSTEM_INSIDE)


def read_talk(conversation: Sequence[Turn]) -> Talk:
    """Questions and answers of a conversation; a leading system turn is kept apart, a leading gpt turn dropped as in LLaVA."""
    turns = [(str(turn.get("from")), turn.get("value")) for turn in conversation]
    system = None
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
        if not isinstance(system, str) or IMAGE in system:
            raise BadSample("conversation", "the system turn has no text, or marks an image")
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
    texts = [str(text) for _, text in turns]
    return Talk(system, list(zip(texts[::2], texts[1::2], strict=True)))


def _plain(talk: Talk) -> list[Piece]:
    if len(talk.pairs) != 1:
        raise BadSample(
            "conversation",
            "the plain template takes one question and one answer; for longer ones write template: vicuna_v1 (or another) in the phase",
        )
    question, answer = talk.pairs[0]
    return [Piece(IMAGE * question.count(IMAGE), False), Piece(answer + "\n", True)]


def _image_first(question: str) -> str:
    if question.count(IMAGE) != 1:
        return question
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()


def _formatted(talk: Talk, form: _Format, *, system_inside: bool) -> list[Piece]:
    # str.replace, not str.format: the text of others may hold braces.
    text = form.system_text if talk.system is None else talk.system
    opening = form.system.replace("{}", text) if text else ""
    made = []
    for position, (question, answer) in enumerate(talk.pairs):
        first = position == 0
        if first and system_inside:
            asked = form.question.replace("{}", opening + question)
        else:
            asked = (opening if first else form.between) + form.question.replace("{}", question)
        made.append(Piece(asked, False))
        made.append(Piece(form.answer.replace("{}", answer) + (form.end or ""), True, ends_turn=form.end is None))
    return made


def _rendered(talk: Talk, render: Render, end: str) -> list[Piece]:
    """The pieces of a tokenizer's own template: what it adds to a prompt when the answer is there is the answer.

    Raises BadSample for a template that changes earlier turns when a later one comes, so that nothing can be told.
    """
    messages = [] if talk.system is None else [{"role": "system", "content": talk.system}]
    made: list[Piece] = []
    written = ""
    for question, answer in talk.pairs:
        messages.append({"role": "user", "content": question})
        prompt = render(messages, True)
        messages.append({"role": "assistant", "content": answer})
        whole = render(messages, False)
        if not prompt.startswith(written) or not whole.startswith(prompt):
            raise BadSample(
                "conversation",
                "the tokenizer's chat template rewrites earlier turns, so its answers cannot be told; choose another template",
            )
        said = whole[len(prompt) :]
        closed = said.rfind(end) + len(end) if end and end in said else len(said)
        made += [Piece(prompt[len(written) :], False), Piece(said[:closed], True)]
        written = whole[: len(prompt) + closed]
    return made
