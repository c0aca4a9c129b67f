"""The encoded bytes of an image by its locator, wherever it lies: a file, a tar, a Parquet file; a disk, a bucket.

The tokenize job reads a unit's images with `UnitReader`; a trainer reads one with `read_image`.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa

from manifests import refs
from manifests.errors import StorageError
from manifests.image_containers import Container, Table, Tar, TarZst, Wanted
from manifests.rejects import Reject, RejectReason
from manifests.shards import Locator
from manifests.storage import Store
from manifests.table_files import open_table

CARRY = "carry."
"""Inventory columns `carry.NAME.offset` and `carry.NAME.length` say where in a tar the text is that is carried along as
NAME; length -1 where there is none."""

DEFAULT_COLUMN = "image"


class DamagedCells(Exception):
    """What is carried along of some members cannot be read, for good: `messages` by their place."""

    def __init__(self, messages: dict[int, str]) -> None:
        super().__init__(f"{len(messages)} members")
        self.messages = messages


@dataclass(frozen=True)
class ImageSource:
    """Where the images of a source are read. Small and picklable.

    root: path or URL that every locator is relative to. column: the one with the image, in Parquet and Arrow files.
    carry: names of source columns that go into the shards.
    """

    root: str
    column: str | None = None
    carry: tuple[str, ...] = ()


class UnitReader:
    """Reads the images of one unit, from any number of threads; a container is opened once for all of them."""

    def __init__(
        self,
        source: ImageSource,
        members: pa.Table,
        rows: Sequence[int],
        store: Store | None = None,
        *,
        carried: Sequence[int] = (),
    ) -> None:
        """`members` as an inventory has them; `rows` are the places in it that will be read, each once, and `carried`
        those whose carried columns will be. What is in neither is not held when the reader comes past it.
        """
        self._source = source
        self._store = store or Store.open(source.root)
        self._ids: list[str] = members["image_id"].to_pylist()
        self._sizes: list[int] = members["size"].to_pylist()
        self._mtimes: list[int] = members["mtime_ns"].to_pylist()
        self._files: list[str | None] = members["file"].to_pylist()
        self._offsets: list[int] = members["offset"].to_pylist()
        self._texts = {
            name: (members[f"{CARRY}{name}.offset"].to_pylist(), members[f"{CARRY}{name}.length"].to_pylist())
            for name in source.carry
            if f"{CARRY}{name}.offset" in members.schema.names
        }
        self._wanted: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for row in rows:
            if file := self._files[row]:
                self._wanted[file].append((self._offsets[row], self._sizes[row]))
        for offsets, lengths in self._texts.values():
            for row in carried:
                if (file := self._files[row]) and lengths[row] >= 0:
                    self._wanted[file].append((offsets[row], lengths[row]))
        self._open: dict[str, Container] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> UnitReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, row: int) -> bytes:
        """The encoded bytes of a member.

        Raises Reject for what is wrong with this image, `OSError` where trying again may help, `StorageError` where
        the storage refuses or the container is no longer the one in the inventory.
        """
        file = self._files[row]
        if file is None:
            return _read_own_file(self._store, self._ids[row], self._sizes[row])
        return self._container(file, row).read(self._offsets[row], self._sizes[row])

    def name(self, row: int) -> str:
        """The image_id of a member, for messages."""
        return self._ids[row]

    def locator(self, row: int, length: int) -> Locator:
        """What a shard says of where a member is, once it is known to have `length` bytes."""
        return Locator(self._files[row] or self._ids[row], self._offsets[row], length)

    def carried(self, rows: Sequence[int]) -> pa.Table | None:
        """The carried columns of some members, in this order; None if nothing is carried.

        Raises as `read` does, and `DamagedCells` naming all members of which that is due to damage.
        """
        if not self._source.carry:
            return None
        if self._texts:
            columns = {name: [self._text(name, row) for row in rows] for name in self._source.carry}
            return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
        by_file: dict[str, list[int]] = defaultdict(list)
        for row in rows:
            by_file[self._files[row] or ""].append(row)
        parts: list[pa.Table] = []
        places: list[int] = []
        damaged: dict[int, str] = {}
        for file, members in by_file.items():
            members.sort(key=self._offsets.__getitem__)
            parts += self._cells(file, members, damaged)
            places += members
        if damaged:
            raise DamagedCells(damaged)
        if not parts:
            return None
        order = {row: place for place, row in enumerate(places)}
        return pa.concat_tables(parts).take(np.array([order[row] for row in rows], np.int64))

    def close(self) -> None:
        """Close the containers; nobody may be reading."""
        for container in self._open.values():
            container.close()
        self._open.clear()

    def _container(self, file: str, row: int) -> Container:
        with self._lock:
            if file not in self._open:
                found = self._store.stat(file)
                if found is None or found.mtime_ns != self._mtimes[row]:
                    what = "is gone" if found is None else "has changed"
                    raise StorageError(
                        f"{self._store.where(file)} {what} since its images were listed: run the same command again"
                    )
                self._open[file] = _open_container(self._store, file, self._wanted[file], self._source.column)
            return self._open[file]

    def _text(self, name: str, row: int) -> str | None:
        offsets, lengths = self._texts[name]
        file = self._files[row]
        if file is None or lengths[row] < 0:
            return None
        return self._container(file, row).read(offsets[row], lengths[row]).decode(errors="replace")

    def _cells(self, file: str, members: Sequence[int], damaged: dict[int, str]) -> Iterator[pa.Table]:
        """The carried cells of members in the order of their rows, a row group at a time; what is damaged is told."""
        table = open_table(self._store, file)
        try:
            for _, group in groupby(members, key=lambda member: table.group_end(self._offsets[member])):
                here = list(group)
                try:
                    found = table.take([self._offsets[member] for member in here], self._source.carry)
                except (pa.ArrowException, OSError) as error:
                    if fault := self._store.fault(file, error):
                        raise fault from error
                    if isinstance(error, OSError) and error.errno is not None:  # the disk's; damage has no number
                        raise
                    why = f"is damaged in {', '.join(self._source.carry)} ({' '.join(str(error).split())[:200]})"
                    where = self._store.where(file)
                    damaged |= {member: f"row {self._offsets[member]} of {where} {why}" for member in here}
                    continue
                # Whether a column may be empty differs between the files of many a data set, and must not between shards.
                nullable = pa.schema([field.with_nullable(True) for field in found.schema])
                yield pa.Table.from_arrays(found.columns, schema=nullable)
        finally:
            table.close()


def read_image(
    store: Store, file: str | None, image_id: str, offset: int, length: int, *, column: str | None = None
) -> bytes:
    """The encoded bytes of one image by its locator, as it stands in a shard.

    `file` is None or the image's own id for an image in a file of its own. `column` is the one with the images in a
    Parquet source (`image_column` in the manifest's source settings). Cheap for files and tars; Parquet costs the rows
    before it in its row group, a compressed tar everything before it. Raises as `UnitReader.read`.
    """
    if file is None or file == image_id:
        return _read_own_file(store, image_id, length)
    container = _open_container(store, file, [(offset, length)], column)
    try:
        return container.read(offset, length)
    finally:
        container.close()


def _open_container(store: Store, file: str, wanted: Wanted, column: str | None) -> Container:
    if file.lower().endswith(".tar"):
        return Tar(store, file, wanted)
    if file.lower().endswith(".tar.zst"):
        return TarZst(store, file, wanted)
    beside: Callable[[str], bytes] = lambda path: _read_own_file(store, path, 0)  # noqa: E731
    return Table(store, file, wanted, column or DEFAULT_COLUMN, beside)


def _read_own_file(store: Store, reference: str, size: int) -> bytes:
    """An image in a file of its own. On a disk links out of the root, pipes and devices are rejects."""
    if store.is_local:
        return refs.read_image(store.location, reference)
    rel = refs.image_id_of(reference)
    if size > refs.MAX_FILE_BYTES:
        raise Reject(
            RejectReason.UNSUPPORTED,
            f"{store.where(rel)} has {size} bytes, and files above {refs.MAX_FILE_BYTES} are not read",
        )
    try:
        return store.read(rel)
    except StorageError:
        if store.stat(rel) is None:
            raise Reject(RejectReason.MISSING, f"there is no file {store.where(rel)}") from None
        raise
