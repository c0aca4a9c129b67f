"""What one tar holds: its pictures with their places, and what else of each sample is to be carried along."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from manifests.images import CARRY
from manifests.storage import FileStat, Store
from manifests.zstd_stream import DamagedZstd, ZstdStream
from tokenize_stage.sources.inventory import container_rows, is_text
from tokenize_stage.sources.tar_walk import Blocks, DamagedTar, TarMember, walk_tar

PICTURES = frozenset({"jpg", "jpeg", "png", "webp"})

MOST_CARRIED_BYTES = 2**20
"""Largest text that is carried along; the unit of a worker holds thousands of them."""

LOCAL_READ, REMOTE_READ = 2**14, 2**22
"""Bytes read at once from a tar's headers on: a seek is cheap on a disk, a request to an object store is not."""

Place = tuple[int, int]
"""(offset, size) of a member's bytes."""


@dataclass
class TarIndex:
    """The pictures of a tar in its order, and the errors it gave; `texts` has a place for each picture and name."""

    ids: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    texts: dict[str, list[Place | None]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def table(self, file: str, mtime_ns: int) -> pa.Table:
        """The rows of an inventory; `source_row` counts from 0."""
        own = {}
        for name, places in self.texts.items():
            own[f"{CARRY}{name}.offset"] = [place[0] if place else 0 for place in places]
            own[f"{CARRY}{name}.length"] = [place[1] if place else -1 for place in places]
        return container_rows(
            file,
            self.ids,
            size=[size for _, size in self.places],
            mtime_ns=mtime_ns,
            source_row=range(len(self.ids)),
            offset=[offset for offset, _ in self.places],
            own=own,
        )


def index_tar(store: Store, file: str, stat: FileStat, carry: Sequence[str]) -> TarIndex:
    """Walk the headers of a `.tar`, or the whole stream of a `.tar.zst`.

    A tar that is damaged gives what comes before the damage and one error. A member that has a picture's name and is
    none that can be read (a link, a second one of the same name) gives an error each. Raises `OSError` or
    `StorageError` when the storage fails.
    """
    where = store.where(file)
    members: list[TarMember] = []
    errors: list[str] = []
    with store.open_input(file) as stream:
        try:
            blocks: Blocks
            if file.lower().endswith(".zst"):
                blocks = StreamBlocks(ZstdStream(stream))
            else:
                blocks = FileBlocks(stream, stat.size, LOCAL_READ if store.is_local else REMOTE_READ)
            for member in walk_tar(blocks):  # keeps what came before the damage
                members.append(member)  # noqa: PERF402
        except DamagedTar as damage:
            errors.append(f"{where} {damage}")
        except DamagedZstd as damage:
            errors.append(f"{where} is {damage}")
        except OSError as error:
            raise store.fault(file, error) or error from error
    return _index(file, where, members, errors, carry)


def _index(file: str, where: str, members: list[TarMember], errors: list[str], carry: Sequence[str]) -> TarIndex:
    index = TarIndex(texts={name: [] for name in carry}, errors=errors)
    places: dict[str, Place] = {}
    texts: dict[tuple[str, str], Place] = {}
    keys: list[str] = []
    taken: set[str] = set()
    for member in members:
        name = _plain(member.name)
        key, suffix = _key_and_suffix(name)
        place = places.get(_plain(member.link)) if member.what == "link" else (member.offset, member.size)
        place = place if member.what in ("file", "link") else None
        is_second = name in places
        if place and not is_second:
            places[name] = place
        if key and suffix.rpartition(".")[2] in PICTURES:
            if not is_text(name):
                errors.append(f"{where}: the member {name!r} is not UTF-8, so it cannot be an image_id")
            elif place is None:
                what = f"a hard link to {member.link!r}, which is not there" if member.what == "link" else member.what
                errors.append(f"{where}: the member {name!r} is {what}: pack the pictures themselves")
            elif is_second:
                errors.append(f"{where}: there is a second member {name!r}, and the first one is used")
            else:
                short = f"{file}!{key}"
                image_id = f"{file}!{name}" if "." in suffix or short in taken else short
                taken.add(image_id)
                index.ids.append(image_id)
                index.places.append(place)
                keys.append(key)
        elif key and suffix in index.texts and place and not is_second:
            if place[1] > MOST_CARRIED_BYTES:
                errors.append(f"{where}: the member {name!r} has {place[1]} bytes, too many to be carried along")
            else:
                texts.setdefault((key, suffix), place)
    for name, column in index.texts.items():
        column += [texts.get((key, name)) for key in keys]
    return index


def _plain(name: str) -> str:
    """A member's name without the `./` that `tar -c .` puts before all of them."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _key_and_suffix(name: str) -> tuple[str, str]:
    """A sample's key, up to the first dot of the file's name, and what comes after it in lower case; hidden files have none."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}", suffix.lower()) if stem and dot else ("", "")


class FileBlocks:
    """A file of which only what is asked for is read, `ahead` bytes at a time."""

    def __init__(self, file: pa.NativeFile, size: int, ahead: int) -> None:
        self.position = 0
        self._file, self._size, self._ahead = file, size, ahead
        self._buffer, self._start = b"", 0

    def read(self, size: int) -> bytes:
        at = self.position - self._start
        if at + size > len(self._buffer) or at < 0:
            wanted = min(max(size, self._ahead), self._size - self.position)
            self._buffer, self._start, at = (
                self._file.read_at(wanted, self.position) if wanted else b"",
                self.position,
                0,
            )
        data = self._buffer[at : at + size]
        self.position += len(data)
        return data

    def skip(self, size: int) -> bool:
        whole = size <= self._size - self.position
        self.position = self.position + size if whole else self._size
        return whole


class StreamBlocks:
    """A stream of decompressed bytes."""

    def __init__(self, stream: ZstdStream) -> None:
        self.position = 0
        self._stream = io.BufferedReader(stream, 2**16)

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.position += len(data)
        return data

    def skip(self, size: int) -> bool:
        while size:
            data = self.read(min(size, 2**20))
            if not data:
                return False
            size -= len(data)
        return True
