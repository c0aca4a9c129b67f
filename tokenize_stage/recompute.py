"""Tokenize a random sample of a token set again, with its own settings, and compare: `asvr verify --sample N --recompute`.

A position whose codes differ is judged by margin, see `tokenize_stage.margin`: what rounding can explain is counted as a
flip, anything else is a problem of the set. So is an image of the same bytes whose size or views are others now. An
image whose bytes changed or that cannot be read any more says nothing about the codes: it is named and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.errors import FingerprintMismatch, InputError
from manifests.fingerprint import differing_keys
from manifests.images import ImageSource, UnitReader
from manifests.reader import OpenManifest, load_manifest
from manifests.rejects import Reject
from manifests.report import Problem
from manifests.rows import take_rows
from manifests.schema import FeaturesSpec, SourceIdentity
from manifests.shards import INDEX_SCHEMA
from manifests.storage import Store
from manifests.table_reader import rows_at
from tokenize_stage.batches import Batch, fill_batches
from tokenize_stage.config import TokenSetConfig
from tokenize_stage.decoding import SourceFailedError, decode_images
from tokenize_stage.device_memory import enough_memory
from tokenize_stage.margin import TOLERANCE, feature_shifts, shifts
from tokenize_stage.order import WorkOrder
from tokenize_stage.output_folder import read_config
from tokenize_stage.resolved import resolve
from tokenize_stage.tokenizers import load

SHOWN = 3
"""Images of a kind that are named."""


@dataclass
class RecomputeReport:
    """What a sample of a set came to. `equal` images have exactly the stored codes (features).

    `flips` are positions that rounding explains, `largest_shift` the largest of their shifts; `changed` and `unreadable`
    images were not compared. `problems` have the codes `recompute_mismatch` and `recompute_views`.
    """

    sampled: int
    compared: int = 0
    equal: int = 0
    positions: int = 0
    flips: int = 0
    largest_shift: float = 0.0
    changed: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class Sampled:
    """One image of the sample as the set has it: `values_VPX`, its codes or features."""

    image_id: str
    shard: str
    sha256: str
    width: int
    height: int
    boxes_V4: npt.NDArray[np.float32]
    values_VPX: npt.NDArray[Any]


def recompute(
    store: Store, count: int, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> RecomputeReport:
    """Compare up to `count` ok images of the set in `store`, chosen by `seed`.

    Raises `InputError` when the folder does not say how the set was made, or none of the images can be read;
    `FingerprintMismatch` when the tokenizer's files or the software make other codes by design; `EnvironmentProblem`
    when the device is out of memory; and what loading the tokenizer raises.
    """
    opened = load_manifest(store.location)
    config = read_config(store)
    order = _order(opened, config)
    drawn = _draw(opened, count, seed)
    report = RecomputeReport(sampled=len(drawn))
    with enough_memory(order.batch_size):
        comparison = _Comparison(order, config, report)
    images = _readable(opened, drawn, order, report)
    for done, batch in enumerate(fill_batches(comparison.views(images), order.batch_size, order.geometry.size), 1):
        with enough_memory(order.batch_size):
            comparison.compare(batch)
        if progress:
            progress(min(done * order.batch_size, len(drawn)), len(drawn))
    comparison.finish()
    if len(drawn) and not report.compared:
        why = (report.unreadable or report.changed)[0]
        raise InputError(
            f"none of the {len(drawn)} images sampled from {store.location} can be compared (first: {why})"
        )
    return report


def image_source(source: SourceIdentity) -> ImageSource:
    """Where the locators of a set lead; `InputError` for a set that was made from several sources."""
    if source.kind in ("merge", "filter"):
        raise InputError(
            f"a set made by asvr manifest {source.kind} cannot be recomputed: do it with the sets it was made of"
        )
    column = source.settings.get("image_column")
    return ImageSource(str(source.settings.get("image_root") or source.location), str(column) if column else None)


def _order(opened: OpenManifest, config: TokenSetConfig) -> WorkOrder:
    manifest = opened.manifest
    images = image_source(manifest.source)
    job = resolve(config)
    if names := differing_keys(manifest.fingerprint_keys, job.keys):
        raise FingerprintMismatch(
            f"{opened.store.location} cannot be recomputed, since what is installed here makes other codes "
            f"({'; '.join(names[:SHOWN])}): restore the tokenizer's files and the software that made it"
        )
    return job.work_order(images)


def _draw(opened: OpenManifest, count: int, seed: int) -> pa.Table:
    """The index rows of up to `count` images, in its order: chosen by their number alone, then read in one pass."""
    rows = opened.manifest.index.rows
    places = np.sort(np.random.default_rng(seed).choice(rows, min(count, rows), replace=False))
    return rows_at(opened.iter_index(INDEX_SCHEMA.names), places, INDEX_SCHEMA)


def _readable(
    opened: OpenManifest, drawn: pa.Table, order: WorkOrder, report: RecomputeReport
) -> Iterator[tuple[Sampled, npt.NDArray[np.uint8]]]:
    """The sampled images that are still the ones that were tokenized, with their views (V, S, S, 3)."""
    for group in np.array_split(np.arange(len(drawn)), max(1, len(drawn) // 64)):
        sampled, members = _sample(opened, drawn.take(pa.array(group)))
        with UnitReader(order.images, members, range(len(sampled))) as reader:
            for row, image in enumerate(sampled):
                try:
                    decoded = decode_images(order, reader, [row])
                except SourceFailedError as error:
                    report.unreadable.append(f"{image.image_id}: {error}")
                    continue
                picture = decoded.outcomes[0]
                if isinstance(picture, Reject):
                    report.unreadable.append(f"{image.image_id}: {picture.message}")
                elif picture.sha256 != image.sha256:
                    report.changed.append(image.image_id)
                else:
                    same = (picture.width, picture.height) == (image.width, image.height)
                    if not same or not np.array_equal(picture.boxes_V4, image.boxes_V4):
                        message = f"{image.image_id!r} has other views now than the set says: tokenize it again"
                        report.problems.append(Problem("recompute_views", image.shard, message))
                    else:
                        yield image, decoded.views_NSS3


def _sample(opened: OpenManifest, index: pa.Table) -> tuple[list[Sampled], pa.Table]:
    """Some rows of the index with what their shards say, and the same as members that a reader takes."""
    ids = index["image_id"].to_pylist()
    columns = ["view_boxes", "file", "offset", "length"]
    found: list[dict[str, Any]] = [{}] * len(ids)
    ordinals, places = index["shard"].to_numpy(), index["row"].to_numpy()
    values = opened.values_at(ordinals, places)
    for ordinal in np.unique(ordinals):
        mine = np.flatnonzero(ordinals == ordinal)
        table = take_rows(opened, opened.shards[ordinal], places[mine], columns)
        for at, row in zip(mine, table.to_pylist(), strict=True):
            found[at] = row
    known = index.to_pylist()
    sampled = [
        Sampled(
            row["image_id"],
            opened.shards[row["shard"]].path,
            row["sha256"],
            row["width"],
            row["height"],
            np.asarray(place["view_boxes"], np.float32).reshape(-1, 4),
            stored,
        )
        for row, place, stored in zip(known, found, values, strict=True)
    ]
    members = pa.table(
        {
            "image_id": index["image_id"],
            "size": pa.array([place["length"] for place in found], pa.int64()),
            "mtime_ns": index["source_mtime_ns"],
            "source_row": pa.array(np.zeros(len(ids), np.int64)),
            "file": pa.array(
                [place["file"] if place["file"] != name else None for name, place in zip(ids, found, strict=True)],
                pa.string(),
            ),
            "offset": pa.array([place["offset"] for place in found], pa.int64()),
        }
    )
    return sampled, members


class _Comparison:
    """Encodes batches of views and keeps score. A position of padding is compared like any other."""

    def __init__(self, order: WorkOrder, config: TokenSetConfig, report: RecomputeReport) -> None:
        import torch

        torch.set_num_threads(order.torch_threads)
        self._spec = order.spec
        self._report = report
        self._tolerance = TOLERANCE[config.compute_dtype]
        self._tokenizer = load(order.tokenizer, order.spec, dtype=order.dtype, device=order.device)
        self._images: list[Sampled] = []
        self._image_of: list[int] = []  # of each view in the stream
        self._view_of: list[int] = []
        self._clean: list[bool] = []
        self._worst: dict[int, tuple[float, str]] = {}

    def views(self, images: Iterator[tuple[Sampled, npt.NDArray[np.uint8]]]) -> Iterator[npt.NDArray[np.uint8]]:
        """The views of the images, which are remembered in the order in which they go into batches."""
        for image, views_VSS3 in images:
            self._image_of += [len(self._images)] * len(views_VSS3)
            self._view_of += range(len(views_VSS3))
            self._images.append(image)
            self._clean.append(True)
            self._report.compared += 1
            yield views_VSS3

    def compare(self, batch: Batch) -> None:
        """Encode a batch and judge every position of the views in it."""
        import torch

        views_BSS3 = torch.from_numpy(batch.views_BSS3)
        computed_BPX = self._tokenizer.encode(views_BSS3)
        if computed_BPX.dtype == torch.bfloat16:
            computed_BPX = computed_BPX.float()
        computed = computed_BPX.cpu().numpy()
        features: npt.NDArray[np.float32] | None = None
        for slot in np.flatnonzero(batch.filled_B):
            image, view = self._image_of[batch.first + slot], self._view_of[batch.first + slot]
            stored_PX = self._images[image].values_VPX[view]
            self._report.positions += len(stored_PX)
            if np.array_equal(stored_PX, computed[slot]):
                continue
            self._clean[image] = False
            if isinstance(self._spec, FeaturesSpec):
                shift_N = feature_shifts(stored_PX, computed[slot])
                self._judge(image, shift_N[shift_N > 0], np.zeros((shift_N > 0).sum(), np.int64))
                continue
            if features is None:
                features = self._tokenizer.encoder.features(views_BSS3).float().cpu().numpy()
            found = shifts(
                features[slot],
                stored_PX.astype(np.int64),
                computed[slot],
                self._tokenizer.codebooks(),
                residual=self._spec.residual,
            )
            self._judge(image, found.shift_M, found.depth_M)

    def _judge(self, image: int, shift_M: npt.NDArray[np.float64], depth_M: npt.NDArray[np.int64]) -> None:
        rounding = shift_M <= self._tolerance
        self._report.flips += int(rounding.sum())
        if rounding.any():
            self._report.largest_shift = max(self._report.largest_shift, float(shift_M[rounding].max()))
        if not rounding.all():
            worst = int(shift_M.argmax())
            what = "features" if isinstance(self._spec, FeaturesSpec) else f"a code of depth {depth_M[worst]}"
            text = f"{(~rounding).sum()} positions of a view, first with {what} that would take a shift of {shift_M[worst]:.2g}"
            if image not in self._worst or self._worst[image][0] < shift_M[worst]:
                self._worst[image] = (float(shift_M[worst]), text)

    def finish(self) -> None:
        """Name the images that do not agree."""
        self._report.equal = sum(self._clean)
        for number, (_, text) in sorted(self._worst.items()):
            image = self._images[number]
            message = (
                f"{image.image_id!r} has other {'features' if isinstance(self._spec, FeaturesSpec) else 'codes'} than its "
                f"bytes give ({text}, rounding explains {self._tolerance:.2g}): delete the shard's commit record and "
                "tokenize again"
            )
            self._report.problems.append(Problem("recompute_mismatch", image.shard, message))
