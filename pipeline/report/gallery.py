"""The images of a report: which ones, what the encoder saw of them, their codes, and the text carried along with them.

Shape suffixes: P positions of a view (row-major), D depths, S edge of a kept picture.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from manifests.decode import Reject, RejectReason, decode
from manifests.errors import AsvrError, VerificationFailed
from manifests.geometry import content_mask, make_views
from manifests.images import ImageSource, read_image
from manifests.reader import OpenManifest
from manifests.rows import ShardRow, find_places, read_rows, source_of
from manifests.schema import Geometry
from manifests.shards import INDEX_SCHEMA, list_values, shard_schema, value_column
from manifests.storage import Store
from manifests.table_reader import rows_at

EDGE = 224
"""Largest edge at which pictures are kept and shown."""

AT_ONCE = 64
GIVE_UP_AFTER = 8
"""Pictures in a row that the storage refuses, after which no more are asked for."""


@dataclass(frozen=True)
class Card:
    """One image of the gallery. `picture` is its first view, uint8 (S, S, 3), or None with the reason in `problem`."""

    image_id: str
    width: int
    height: int
    shard: str
    row: int
    views: int
    picture: NDArray[np.uint8] | None
    problem: str
    codes_PD: NDArray[np.unsignedinteger] | None
    shows_picture_P: NDArray[np.bool_]
    texts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The image, its size, and where it stands."""
        return f"{self.width} x {self.height} pixels, row {self.row} of {self.shard}"


def choose_images(opened: OpenManifest, count: int, first: Sequence[str] = ()) -> list[str]:
    """At most `count` image ids: those of `first` that the set has, then images evenly spaced over the index."""
    wanted = list(dict.fromkeys(first))
    present = _present(opened, wanted)
    chosen = [name for name in wanted if name in present][:count]
    rows = opened.manifest.index.rows
    spaced = np.unique(np.linspace(0, max(0, rows - 1), min(count, rows)).round().astype(np.int64))
    schema = pa.schema([INDEX_SCHEMA.field("image_id")])
    for name in rows_at(opened.iter_index(["image_id"]), spaced, schema)["image_id"].to_pylist():
        if len(chosen) >= count:
            break
        if name not in present:
            chosen.append(name)
    return chosen


def _present(opened: OpenManifest, names: Sequence[str]) -> set[str]:
    """Those of some images that the set has."""
    found: set[str] = set()
    if names:
        wanted = pa.array(names, pa.string())
        for batch in opened.iter_index(["image_id"]):
            found.update(batch.filter(pc.is_in(batch["image_id"], value_set=wanted))["image_id"].to_pylist())
    return found


def read_cards(
    opened: OpenManifest, image_ids: Sequence[str], progress: Callable[[int, int], None] | None = None
) -> list[Card]:
    """The images, in the order asked. A picture that cannot be read leaves a card that says why.

    Raises `VerificationFailed` for a damaged shard.
    """
    cards: list[Card] = []
    places = find_places(opened, image_ids)
    reader = PictureReader(opened)
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(image_ids), AT_ONCE):
            rows = read_rows(opened, places[start : start + AT_ONCE])
            pictures = list(pool.map(reader.first_view, rows))
            cards += [_card(opened, row, *picture) for row, picture in zip(rows, pictures, strict=True)]
            if progress:
                progress(len(cards), len(image_ids))
    return cards


class PictureReader:
    """Reads the pictures of a set's rows where their locators lead, and gives up on a source that is not there."""

    def __init__(self, opened: OpenManifest) -> None:
        self._source = opened.manifest.source
        self._geometry = opened.manifest.geometry
        self._stores: dict[str, Store] = {}
        self._refused = 0
        self._last = ""

    def first_view(self, row: ShardRow) -> tuple[NDArray[np.uint8] | None, str]:
        """The first view, at most EDGE pixels wide; or None and one sentence why there is none."""
        if self._refused >= GIVE_UP_AFTER:
            return None, f"not asked for, after {self._refused} pictures that could not be read: {self._last}"
        try:
            pixels = self.decoded(row)
        except Reject as reject:
            return None, reject.message
        except (AsvrError, OSError) as error:
            self._refused, self._last = self._refused + 1, str(error)
            return None, str(error)
        self._refused = 0
        view = base_view(pixels, self._geometry)
        edge = min(EDGE, len(view))
        return np.asarray(Image.fromarray(view).resize((edge, edge), Image.Resampling.BICUBIC)), ""

    def decoded(self, row: ShardRow) -> NDArray[np.uint8]:
        """The picture uint8 (H, W, 3). Raises as `read_image` and `decode`; Reject also for bytes that are others now."""
        source = source_of(self._source, row.shard.unit)
        file, image_id, offset, length, sha256 = (
            row.values[name][0].as_py() for name in ("file", "image_id", "offset", "length", "sha256")
        )
        data = read_image(self._store(source), file, image_id, offset, length, column=source.column)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Reject(RejectReason.UNREADABLE, f"{image_id} has changed since it was tokenized")
        return decode(data, max_pixels=2**31 - 1)

    def _store(self, source: ImageSource) -> Store:
        if source.root not in self._stores:
            self._stores[source.root] = Store.open(source.root)
        return self._stores[source.root]


def base_view(pixels: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """The first view uint8 (S, S, 3): of `anyres` the whole picture squashed."""
    return make_views(pixels, geometry)[0][0]


def encoded(picture: NDArray[np.uint8], edge: int = EDGE) -> bytes:
    """A picture as WebP, at most `edge` pixels wide."""
    image = Image.fromarray(picture)
    image.thumbnail((edge, edge), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=78, method=2)
    return stream.getvalue()


def codes_of(opened: OpenManifest, row: ShardRow) -> NDArray[np.unsignedinteger] | None:
    """The codes (V, P, D) of a row; None in a set of features. `VerificationFailed` for what cannot be codes."""
    spec = opened.manifest.tokenizer
    if spec is None:
        return None
    flat, _ = list_values(row.values["codes"])
    whole = flat.size and not flat.size % (spec.positions * spec.depth)
    codes_VPD = flat.reshape(-1, spec.positions, spec.depth) if whole else None
    if codes_VPD is None or (codes_VPD >= np.array(spec.codebook_sizes)).any():
        where = opened.store.where(row.shard.path)
        raise VerificationFailed(f"row {row.row} of {where} holds no codes of this tokenizer: run asvr verify")
    return codes_VPD


def boxes_of(row: ShardRow) -> NDArray[np.float32]:
    """The boxes (V, 4) of a row's views in source pixels."""
    return list_values(row.values["view_boxes"])[0].reshape(-1, 4)


def carried(opened: OpenManifest, row: ShardRow) -> list[tuple[str, str]]:
    """Names and text of the source columns that were carried along and are not empty."""
    own = set(shard_schema(value_column(opened.manifest.producer)).names)
    names = [name for name in row.values.schema.names if name not in own]
    values = [(name, row.values[name][0].as_py()) for name in names]
    return [(name, str(value)) for name, value in values if value is not None]


def _card(opened: OpenManifest, row: ShardRow, picture: NDArray[np.uint8] | None, problem: str) -> Card:
    codes_VPD, boxes = codes_of(opened, row), boxes_of(row)
    width, height = row.values["width"][0].as_py(), row.values["height"][0].as_py()
    return Card(
        image_id=row.values["image_id"][0].as_py(),
        width=width,
        height=height,
        shard=row.shard.path,
        row=row.row,
        views=len(boxes),
        picture=picture,
        problem=problem,
        codes_PD=None if codes_VPD is None else codes_VPD[0],
        shows_picture_P=content_mask(boxes[:1], opened.manifest.producer.grid, width, height),
        texts=carried(opened, row),
    )
