"""Conversations in the `messages` form of Hugging Face data sets, as the turns that LLaVA writes.

`{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}, ...],
"images": ["a.jpg"]}`; `content` may be plain text, in which `<image>` marks a picture.
"""

from __future__ import annotations

from typing import Any

_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}

IMAGE = "<image>"
"""How records mark the place of an image, whatever a tokenizer's own image token is called."""


def turns_of_messages(messages: list[Any]) -> list[dict[str, str]]:
    """The turns `{"from": ..., "value": ...}` of a list of messages; image parts become `<image>` where they stand.

    Raises ValueError, saying which message, for a role or a part that LLaVA's form has no place for.
    """
    turns = []
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _SPEAKERS:
            raise ValueError(f"message {number} has no role user, assistant or system")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise ValueError(f'message {number} has no "content", which is text or a list of parts')  # noqa: TRY004 - the record is wrong, not the call
        turns.append({"from": _SPEAKERS[role], "value": "".join(_text(part, number) for part in parts)})
    return turns


def _text(part: Any, number: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return IMAGE
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError(
        f'message {number} has a part that is neither {{"type": "image"}} nor {{"type": "text"}} with text'
    )
