"""The members of a tar in order, from its headers alone: what they are called, where their bytes lie, how many.

Nothing is extracted, so a name is only a name. Formats: ustar, GNU (long names, base-256 sizes), POSIX pax.
Where a tar stops being one, everything before that place has been delivered and one `DamagedTar` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

BLOCK = 512
MOST_HEADER_BYTES = 2**20
"""Largest long name or pax header that is read."""

_MOST_ZEROS = 2**20  # after the end mark; writers pad to their record size
_ZEROS = bytes(BLOCK)
_OTHER: dict[bytes, str] = {
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}
_NO_PAYLOAD = frozenset(b"123456")
_LONG_NAME, _LONG_LINK, _FOLDERS = b"L", b"K", b"5D"


class DamagedTar(Exception):
    """The tar goes no further; the message completes "TAR …"."""


class Blocks(Protocol):
    """Bytes that are read front to back."""

    position: int

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end."""
        ...

    def skip(self, size: int) -> bool:
        """Go on by `size` bytes; False where the end comes first."""
        ...


class TarMember(NamedTuple):
    """A member that is no folder.

    `what` is "file": `size` bytes at `offset`; or "link": a hard link to the member called `link`; else it says in words
    what else it is, which has no bytes that could be read.
    """

    name: str
    what: str
    offset: int
    size: int
    link: str = ""


def walk_tar(blocks: Blocks) -> Iterator[TarMember]:
    """The members in the order of the archive; raises `DamagedTar` after the last that is whole."""
    ended = False
    zeros = 0
    everywhere: dict[str, str] = {}
    while True:
        start = blocks.position
        header = blocks.read(BLOCK)
        if ended and len(header) < BLOCK:
            return
        if not header:
            raise DamagedTar(
                "is empty" if not start else f"has no end mark: it was cut off at byte {start}, or not closed"
            )
        if len(header) < BLOCK:
            raise DamagedTar(f"is cut off in the header at byte {start}" if start else "is no tar")
        if header == _ZEROS:
            ended = True
            zeros += BLOCK
            if zeros > _MOST_ZEROS:
                return
            continue
        ended, zeros = False, 0  # an archive that was appended by cat
        yield from _member(blocks, header, start, everywhere)


def _member(blocks: Blocks, header: bytes, start: int, everywhere: dict[str, str]) -> Iterator[TarMember]:
    """The member that a header begins, after what long names and pax headers before it say."""
    said: dict[str, str] = {}
    while True:
        _check(header, start)
        kind, size = header[156:157], _number(header[124:136], start)
        if kind not in (_LONG_NAME, _LONG_LINK, b"x", b"X", b"g"):
            break
        data = _extension(blocks, size, start)
        if kind == _LONG_NAME:
            said["path"] = _text(data.split(b"\0", 1)[0])
        elif kind == _LONG_LINK:
            said["linkpath"] = _text(data.split(b"\0", 1)[0])
        else:
            (everywhere if kind == b"g" else said).update(_pax_records(data, start))
        if kind == b"g":
            return
        start = blocks.position
        header = blocks.read(BLOCK)
        if len(header) < BLOCK or header == _ZEROS:
            raise DamagedTar(f"is cut off in the header at byte {start}")
    said = {**everywhere, **said}
    name = said.get("GNU.sparse.name") or said.get("path") or _header_name(header)
    if "size" in said:
        size = _decimal(said["size"], start)
    if kind == b"S":
        _skip_sparse_map(blocks, header, start)
    offset = blocks.position
    payload = 0 if kind[0] in _NO_PAYLOAD else size
    if not blocks.skip(payload):
        raise DamagedTar(f"is cut off in the member {name!r} at byte {offset}")
    blocks.skip(-payload % BLOCK)
    if kind in (b"5", b"D") or name.endswith("/"):
        return
    if kind == b"1":
        yield TarMember(name, "link", 0, 0, said.get("linkpath") or _text(header[157:257].split(b"\0", 1)[0]))
    elif any(key.startswith("GNU.sparse.") for key in said):
        yield TarMember(name, _OTHER[b"S"], 0, 0)
    else:
        yield TarMember(name, _OTHER.get(kind, "file"), offset, size)


def _check(header: bytes, start: int) -> None:
    """The checksum: the sum of the header with eight blanks in its place; some old writers summed signed bytes."""
    stored = _number(header[148:156], start)
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if stored == total:
        return
    high = sum(1 for byte in header[:148] + header[156:] if byte > 127)
    if stored != total - 256 * high:
        raise DamagedTar("is no tar" if not start else f"has something that is no header at byte {start}")


def _number(field: bytes, start: int) -> int:
    """Octal digits, or base 256 behind a byte of 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    try:
        number = int(digits, 8) if digits else 0
    except ValueError:
        number = -1
    if number < 0:
        raise DamagedTar("is no tar" if not start else f"has something that is no header at byte {start}")
    return number


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _extension(blocks: Blocks, size: int, start: int) -> bytes:
    if size > MOST_HEADER_BYTES:
        raise DamagedTar(f"has a header of {size} bytes at byte {start}")
    data = blocks.read(size)
    if len(data) < size or not blocks.skip(-size % BLOCK):
        raise DamagedTar(f"is cut off in the header at byte {start}")
    return data


def _pax_records(data: bytes, start: int) -> Iterator[tuple[str, str]]:
    """The "LENGTH KEY=VALUE\\n" records of a pax header, of which only some matter."""
    at = 0
    while at < len(data) and data[at]:
        digits = data[at : at + 20].split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() else 0
        record = data[at + len(digits) + 1 : at + length - 1]
        key, found, value = record.partition(b"=")
        if length <= len(digits) + 1 or at + length > len(data) or not found:
            raise DamagedTar(f"has a broken pax header at byte {start}")
        if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse."):
            yield _text(key), _text(value.split(b"\0", 1)[0])
        at += length


def _decimal(text: str, start: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise DamagedTar(f"has a broken pax header at byte {start}")
    return int(text)


def _skip_sparse_map(blocks: Blocks, header: bytes, start: int) -> None:
    more = header[482]
    while more:
        block = blocks.read(BLOCK)
        if len(block) < BLOCK:
            raise DamagedTar(f"is cut off in the header at byte {start}")
        more = block[504]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
