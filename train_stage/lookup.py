"""Where images stand in the indexes of a phase's manifests, found in one pass that holds none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from manifests.anyres import view_counts
from manifests.errors import InputError, VerificationFailed
from manifests.reader import OpenManifest

NO_ROW = -1


@dataclass(frozen=True)
class Rows:
    """What the indexes of some manifests say of N images; the rest of an image whose `row` is NO_ROW means nothing.

    row          int64 (N,): number of its row, counted through the manifests in their order
    sha256       uint8 (N, 32): sha256 of its encoded bytes
    source_size  int64 (N,): how many those were when it was tokenized
    picture_size int32 (N, 2): width and height of the picture
    first_view   int64 (N,): number of its first view, counted through its own manifest
    views        int32 (N,): how many it has
    """

    row: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    source_size: NDArray[np.int64]
    picture_size: NDArray[np.int32]
    first_view: NDArray[np.int64]
    views: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.row)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def take(self, which: NDArray[np.int64]) -> Rows:
        """The rows of these of the images."""
        return Rows(*(getattr(self, field.name)[which] for field in fields(self)))


def find_rows(manifests: Sequence[OpenManifest], image_ids: Sequence[str]) -> Rows:
    """The first row of each image, in the order of `image_ids`; the indexes are read once, by record batches.

    Raises InputError where an id stands for different pictures in two manifests, VerificationFailed for an index that
    is not the manifest's.
    """
    number: dict[str, int] = {}
    which = np.fromiter(
        (number.setdefault(image_id, len(number)) for image_id in image_ids), np.int64, count=len(image_ids)
    )
    count = len(number)
    found = Rows(
        np.full(count, NO_ROW, np.int64),
        np.zeros((count, 32), np.uint8),
        np.zeros(count, np.int64),
        np.zeros((count, 2), np.int32),
        np.zeros(count, np.int64),
        np.zeros(count, np.int32),
    )
    row, twice = 0, set()
    for manifest in manifests if count else ():
        geometry, first_row, first_view = manifest.manifest.geometry, row, 0
        for batch in manifest.iter_index(["image_id", "sha256", "width", "height", "source_size"]):
            at = np.fromiter((number.get(name, -1) for name in batch["image_id"].to_pylist()), np.int64, len(batch))
            mine = np.flatnonzero(at >= 0)
            sha256 = _binary(batch["sha256"].take(pa.array(mine)).to_pylist(), manifest)
            sizes = np.stack([batch[name].to_numpy() for name in ("width", "height")], axis=1)
            views = view_counts(sizes, geometry) if geometry.mode == "anyres" else np.ones(len(batch), np.int64)
            view = first_view + np.cumsum(views) - views
            known = found.row[at[mine]] != NO_ROW
            differ = (found.sha256[at[mine[known]]] != sha256[known]).any(axis=1)
            twice.update(at[mine[known]][differ].tolist())
            new, to = mine[~known], at[mine[~known]]
            found.row[to], found.sha256[to] = row + new, sha256[~known]
            found.source_size[to], found.picture_size[to] = batch["source_size"].to_numpy()[new], sizes[new]
            found.first_view[to], found.views[to] = view[new], views[new]
            row, first_view = row + len(batch), first_view + int(views.sum())
        if row - first_row != sum(shard.rows for shard in manifest.shards):
            raise VerificationFailed(
                f"the index in {manifest.folder} has other rows than its shards: run asvr verify on that folder"
            )
    if twice:
        name = next(name for name, place in number.items() if place in twice)
        raise InputError(
            f"{len(twice)} image ids stand for different pictures in the manifests of a phase, e.g. "
            f"{name}: give these pictures different paths and tokenize them again"
        )
    return found if count == len(which) else found.take(which)


def shard_views(manifest: OpenManifest) -> NDArray[np.int64]:
    """The number of views before each shard of a manifest, int64 (shards + 1,); the last one is that of all."""
    rows = np.concatenate([[0], np.cumsum([shard.rows for shard in manifest.shards], dtype=np.int64)])
    if manifest.manifest.geometry.mode != "anyres":
        return rows
    starts, row, view = np.zeros(len(rows), np.int64), 0, 0
    for batch in manifest.iter_index(["width", "height"]):
        sizes = np.stack([batch[name].to_numpy() for name in ("width", "height")], axis=1)
        ends = np.concatenate([[view], view + np.cumsum(view_counts(sizes, manifest.manifest.geometry))])
        inside = np.flatnonzero((rows >= row) & (rows <= row + len(batch)))
        starts[inside] = ends[rows[inside] - row]
        row, view = row + len(batch), int(ends[-1])
    return starts


def _binary(sha256: list[str], manifest: OpenManifest) -> NDArray[np.uint8]:
    try:
        return np.frombuffer(bytes.fromhex("".join(sha256)), np.uint8).reshape(len(sha256), 32)
    except ValueError:
        raise VerificationFailed(
            f"the index in {manifest.folder} has a sha256 that is none: run asvr verify on that folder"
        ) from None
