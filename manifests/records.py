"""Reading LLaVA records: a JSON list or JSON lines, plain or zstd-compressed.

A record is `{"id": ..., "image": "a.jpg" | ["a.jpg", ...], "conversations": [{"from": ..., "value": ...}, ...]}`,
or the `messages` and `images` of Hugging Face data sets in place of the last two (`manifests.messages`).
One wrong record is a `BadRecord`, counted and named; a file that cannot be read any further is an `InputError`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from manifests.errors import InputError
from manifests.messages import turns_of_messages
from manifests.refs import image_id_of, read_image, resolve_inside
from manifests.storage import Store, is_url
from manifests.zstd_stream import DamagedZstd, ZstdStream

__all__ = ["BadRecord", "Record", "Turn", "image_id_of", "read_image", "read_records", "resolve_inside"]

MAX_LINE_BYTES = 2**26
"""Longest line of a JSONL file; a longer one is a bad record and is never held in memory."""

MAX_DOCUMENT_BYTES = 2**33
"""Largest JSON list, decompressed; it is held in memory as a whole."""

_SUFFIXES = (".json", ".jsonl", ".json.zst", ".jsonl.zst")

Turn = TypedDict("Turn", {"from": str, "value": str})
"""One turn of a conversation, as LLaVA writes it; other keys of the source are dropped."""


@dataclass(frozen=True, slots=True)
class Record:
    """One sample.

    id: the source's own, as text; the row when it has none. images: the references as written, in order, empty for
    a text-only sample. conversations: empty when the record has none (enough to tokenize, not to train on).
    row: position in a JSON list or line of a JSONL file, from 0.
    """

    id: str
    images: tuple[str, ...]
    conversations: tuple[Turn, ...]
    row: int


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used: its row as in `Record`, and one sentence naming file, place and fault."""

    row: int
    message: str


def read_records(path: Path | str) -> Iterator[Record | BadRecord]:
    """Every record of a file, in order.

    path: a path or URL; .json (one list), .jsonl (one object a line, blank lines skipped), or either with .zst. Lines are streamed;
    a list is held as text and parsed record by record. Raises InputError, one sentence with line and column where
    there is one, for a file that is missing, of another kind, not zstd, cut off, not UTF-8 or, in a .json, not JSON.
    The kind and the existence of the file are checked here and now, the content while it is read.
    """
    name = str(path)
    if not name.lower().endswith(_SUFFIXES):
        raise InputError(f"{name} is not a record file; give one that ends in {', '.join(_SUFFIXES)}")
    return _read(name, _open(name), lines=name.lower().endswith((".jsonl", ".jsonl.zst")))


def _open(path: str) -> BinaryIO:
    if is_url(path):
        folder, _, name = path.rpartition("/")
        store = Store.open(folder)
        if store.stat(name) is None:
            raise InputError(f"cannot open the records {path}: no such file")
        return io.BufferedReader(store.open_input(name), 2**22)
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise InputError(f"cannot open the records {path}: {error.strerror}") from None


def _read(path: str, file: BinaryIO, *, lines: bool) -> Iterator[Record | BadRecord]:
    with file:
        stream: BinaryIO = file
        if path.lower().endswith(".zst"):
            stream = io.BufferedReader(ZstdStream(file, bomb_limit=False), 2**20)
        try:
            yield from _read_lines(path, stream) if lines else _read_list(path, stream)
        except DamagedZstd as error:
            raise InputError(f"the compressed records {path} are {error}; copy the file again") from None
        except OSError as error:
            raise InputError(f"cannot read the records {path}: {error.strerror or error}") from None


def _read_lines(path: str, stream: BinaryIO) -> Iterator[Record | BadRecord]:
    row = 0
    while line := stream.readline(MAX_LINE_BYTES):
        where = f"{path}, line {row + 1}"
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE_BYTES)
            yield BadRecord(row, f"{where}: longer than {MAX_LINE_BYTES} bytes; is it one record a line?")
        elif line.strip():
            yield _parse_line(line, row, where)
        row += 1


def _parse_line(line: bytes, row: int, where: str) -> Record | BadRecord:
    try:
        text = line.rstrip(b"\r\n").decode("utf-8-sig" if row == 0 else "utf-8")
        return _record(json.loads(text), row, where)
    except UnicodeDecodeError as error:
        return BadRecord(row, f"{where}, byte {error.start + 1}: not UTF-8")
    except json.JSONDecodeError as error:
        return BadRecord(row, f"{where}, column {error.colno}: not JSON ({error.msg})")
    except RecursionError:
        return BadRecord(row, f"{where}: nested too deeply")
    except ValueError as error:  # an integer of more digits than Python converts
        return BadRecord(row, f"{where}: {error}")


def _read_list(path: str, stream: BinaryIO) -> Iterator[Record | BadRecord]:
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InputError(f"{path} is larger than {MAX_DOCUMENT_BYTES} bytes; write one record a line, as .jsonl")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise InputError(f"{path}, line {line}, byte {column}: not UTF-8; save the file as UTF-8") from None
    del data
    try:
        for row, value in enumerate(_list_items(text)):
            yield _record(value, row, f"{path}, record {row + 1}")
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, column {error.colno}: not a JSON list ({error.msg})") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply to be a list of records") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise InputError(f"{path}: {error}") from None


def _list_items(text: str) -> Iterator[Any]:
    """Parse the items of one JSON list one by one, so that only one is held at a time."""
    scan = json.JSONDecoder().raw_decode
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        hint = "; one object a line is a .jsonl" if text[at : at + 1] == "{" else ""
        raise json.JSONDecodeError(f"Expecting '['{hint}", text, at)
    at = _skip_space(text, at + 1)
    if text[at : at + 1] != "]":
        while True:
            value, at = scan(text, at)
            yield value
            at = _skip_space(text, at)
            if text[at : at + 1] != ",":
                break
            at = _skip_space(text, at + 1)
    if text[at : at + 1] != "]":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    at = _skip_space(text, at + 1)
    if at != len(text):
        raise json.JSONDecodeError("Extra data after the list", text, at)


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _record(value: Any, row: int, where: str) -> Record | BadRecord:
    """Check the shape of one parsed record."""
    if not isinstance(value, dict):
        return BadRecord(row, f"{where}: a record is an object, not {_kind(value)}")
    name = value.get("id")
    if not isinstance(name, str | int | None) or isinstance(name, bool):
        return BadRecord(row, f'{where}: "id" is text or an integer, not {_kind(name)}')
    images = value.get("image", value.get("images"))
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        return BadRecord(row, f'{where}: "image" is a path or a list of paths')
    turns = value.get("conversations")
    messages = value.get("messages")
    if turns is None and isinstance(messages, list):
        try:
            turns = turns_of_messages(messages)
        except ValueError as error:
            return BadRecord(row, f"{where}: {error}")
    turns = [] if turns is None else turns
    if not isinstance(turns, list):
        return BadRecord(row, f'{where}: "conversations" is a list, not {_kind(turns)}')
    conversations: list[Turn] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            return BadRecord(row, f'{where}: turn {number} of "conversations" has no texts "from" and "value"')
        conversations.append({"from": turn["from"], "value": turn["value"]})
    texts = [str(name), *images, *(text for turn in conversations for text in (turn["from"], turn["value"]))]
    if any(_is_half_a_pair(text) for text in texts):
        return BadRecord(row, f"{where}: holds half a surrogate pair, which is no text")
    return Record(str(row) if name is None else str(name), tuple(images), tuple(conversations), row)


def _is_half_a_pair(text: str) -> bool:
    # isascii is a flag of the string, and nearly all text is ASCII.
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
