"""The pictures of a phase: their rows in the manifests, and where their bytes are.

A picture is a file of its own below the image root; or it lies in a tar, Parquet or Arrow file there, at the place
that a manifest's shard has recorded for its image id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests.errors import VerificationFailed
from manifests.images import read_image
from manifests.shard_reader import read_shard
from manifests.storage import Store
from train_stage.chat import BadSample
from train_stage.lookup import NO_ROW, Rows
from train_stage.tables import Tables

ImageKey = tuple[int, str]
"""Number of an image root, and the image id."""

_COMPRESSED_TAR = ".tar.zst"


@dataclass(frozen=True)
class Container:
    """A file with many pictures, relative to the image root; `column` is the one that has them, where it is a table."""

    file: str
    column: str | None


@dataclass(frozen=True)
class Place:
    """Where one picture is in its container. `offset` counts bytes of a tar and rows of a table."""

    container: Container
    offset: int
    length: int


@dataclass(frozen=True)
class Pictures:
    """The M distinct pictures of a phase.

    `root` int32 (M,) indexes `roots`, `container` int32 (M,) indexes `containers`, -1 for a file of its own; `offset`
    and `length` int64 (M,) are the place there. `rows` has what each group of manifests, by its name, says of them.
    """

    roots: list[Store]
    root: NDArray[np.int32]
    ids: list[str]
    rows: dict[str, Rows]
    containers: list[Container]
    container: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]

    def read(self, image: int) -> bytes:
        """The encoded bytes of a picture. Raises as `manifests.images.read_image`."""
        number, store, image_id = int(self.container[image]), self.roots[self.root[image]], self.ids[image]
        length = int(self.length[image])
        if number < 0:
            return read_image(store, None, image_id, 0, length)
        inside = self.containers[number]
        return read_image(store, inside.file, image_id, int(self.offset[image]), length, column=inside.column)

    def where(self, image: int) -> str:
        """A picture and its root, for messages."""
        return f"{self.ids[image]} in {self.roots[self.root[image]].location}"


def join(
    keys: Sequence[ImageKey], locations: Sequence[str], tables: Mapping[str, Tables], threads: int
) -> tuple[Pictures, dict[int, BadSample]]:
    """The pictures of `keys`, in that order, and those that cannot be used, by their index.

    `locations` are the image roots, paths or URLs. A file of its own goes before a place in a container, so that the
    shards are not asked where everything is a file. Raises StorageError where a root cannot be reached.
    """
    ids = [image_id for _, image_id in keys]
    root = np.array([number for number, _ in keys], dtype=np.int32)
    roots = [Store.open(location) for location in locations]
    rows = _find(ids, tables)
    problems: dict[int, BadSample] = {}
    for name, own in tables.items():
        for index in np.flatnonzero(rows[name].row == NO_ROW).tolist():
            kind = own.manifests[0].manifest.kind
            message = f"no {kind} for image {ids[index]}{own.why_missing(ids[index])}"
            problems.setdefault(index, BadSample(f"missing_{kind}", message))

    length = np.full(len(keys), -1, dtype=np.int64)
    for number, store in enumerate(roots):
        mine = np.flatnonzero(root == number)
        length[mine] = [-1 if size is None else size for size in _sizes(store, [ids[i] for i in mine], threads)]
    for index in np.flatnonzero(length >= 0).tolist():
        for name in tables:
            if index not in problems and length[index] != (before := rows[name].source_size[index]):
                problems[index] = BadSample(
                    "changed_image", f"{ids[index]} has {length[index]} bytes but had {before} when it was tokenized"
                )

    absent = [index for index in np.flatnonzero(length < 0).tolist() if index not in problems]
    places = _places(absent, rows, tables)
    containers = list(dict.fromkeys(place.container for place in places.values()))
    number_of = {container: number for number, container in enumerate(containers)}
    there = [_present(store, containers) for store in roots] if containers else []
    container, offset = np.full(len(keys), -1, dtype=np.int32), np.zeros(len(keys), dtype=np.int64)
    for index in absent:
        place, store = places.get(index), roots[root[index]]
        if place is None:
            problems[index] = BadSample("missing_image", f"{ids[index]} is not in {store.location}")
        elif place.container not in there[root[index]]:
            problems[index] = BadSample("missing_image", _no_container(ids[index], place.container.file, store))
        else:
            container[index] = number_of[place.container]
            offset[index], length[index] = place.offset, place.length
    return Pictures(roots, root, ids, rows, containers, container, offset, length), problems


def _find(ids: list[str], tables: Mapping[str, Tables]) -> dict[str, Rows]:
    """What each of the tables has of the images; tables that stand under two names are asked once."""
    found: dict[int, Rows] = {}
    for own in tables.values():
        if id(own) not in found:
            found[id(own)] = own.find(ids)
    return {name: found[id(own)] for name, own in tables.items()}


def _sizes(store: Store, ids: list[str], threads: int) -> list[int | None]:
    if not store.is_local:
        return store.sizes(ids)
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(store.size_if_there, ids))


def _present(store: Store, containers: Sequence[Container]) -> set[Container]:
    sizes = store.sizes([container.file for container in containers])
    return {container for container, size in zip(containers, sizes, strict=True) if size is not None}


def _no_container(image_id: str, file: str, store: Store) -> str:
    packed = f"{file}.zst"
    if file.lower().endswith(".tar") and store.exists(packed):
        return (
            f"{image_id} is in {store.where(packed)}, of which no picture can be read alone: decompress it beside it, "
            f"with zstd -d"
        )
    return f"{image_id} is not in {store.location}, and neither is {file}, in which it was tokenized"


def _places(images: Sequence[int], rows: Mapping[str, Rows], tables: Mapping[str, Tables]) -> dict[int, Place]:
    """Where some images lie in containers, as far as any of the manifests says so."""
    found: dict[int, Place] = {}
    asked: list[Tables] = []
    for name, own in tables.items():
        if any(own is other for other in asked):
            continue
        asked.append(own)
        left = [image for image in images if image not in found]
        for position, place in _places_of(own, rows[name].row[left]):
            found[left[position]] = place
    return found


def _places_of(tables: Tables, rows: NDArray[np.int64]) -> Iterator[tuple[int, Place]]:
    """(position in `rows`, place) of the rows that lie in containers; only the shards that hold them are read."""
    order = np.argsort(rows, kind="stable")
    ascending, start = rows[order], 0
    for opened in tables.manifests:
        source = opened.manifest.source
        for shard in opened.shards:
            first, last = np.searchsorted(ascending, [start, start + shard.rows])
            if first < last:
                read = read_shard(opened.store, shard.path, ["image_id", "file", "offset", "length"])
                if read.num_rows != shard.rows:
                    raise VerificationFailed(
                        f"{opened.store.where(shard.path)} has other rows than its manifest says: "
                        "run asvr verify on its folder"
                    )
                chosen = read.take(pa.array(ascending[first:last] - start))
                column = image_column(source.kind, source.settings, shard.unit)
                inside = pc.not_equal(chosen["file"], chosen["image_id"]).to_pylist()
                values = zip(*(chosen[name].to_pylist() for name in ("file", "offset", "length")), strict=True)
                for position, is_inside, (file, offset, length) in zip(order[first:last], inside, values, strict=True):
                    if is_inside:
                        yield int(position), Place(Container(_plain(file), column), offset, length)
            start += shard.rows


def _plain(file: str) -> str:
    """The tar that a compressed one becomes: what was recorded of it are offsets in the decompressed stream."""
    return file[: -len(".zst")] if file.lower().endswith(_COMPRESSED_TAR) else file


def image_column(kind: str, settings: Mapping[str, Any], unit: str) -> str | None:
    """The column of a Parquet source that has the pictures of a unit; of merged and filtered sets, that of their source."""
    if kind == "merge":
        number, _, unit = unit.partition(".")
        source = settings["sources"][int(number)]
    elif kind == "filter":
        source = settings["source"]
    else:
        return settings.get("image_column")
    return image_column(source["kind"], source["settings"], unit)
