"""One unit becomes one shard: read, decode and view in threads, encode in batches of a fixed shape, write.

Both engines run exactly this, and nothing in it depends on how many workers or threads there are: member i of a unit
sits in slot i % batch of batch i // batch, whatever became of its neighbours (a reject leaves zeros in its slot).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from manifests.commits import CommitRecord, MemberColumns, RejectRow, encode_usage
from manifests.decode import decode
from manifests.errors import EnvironmentProblem, StorageError
from manifests.geometry import make_views
from manifests.refs import read_image
from manifests.rejects import Reject
from manifests.schema import Geometry, Numerics, Producer, ShardEntry
from manifests.shards import Locator, ShardData, encode_shard, shard_name, value_column
from manifests.storage import Store
from tokenize_stage.config import ComputeDtype, Device, TokenizerConfig
from tokenize_stage.outcomes import Picture, UnitDone, UnitFailed, UnitMetrics
from tokenize_stage.retry import with_retries
from tokenize_stage.survivors import Survivors
from tokenize_stage.units import Unit

if TYPE_CHECKING:
    from tokenize_stage.tokenizers.base import Tokenizer

VIEWS = 1
"""Views of an image in the geometries there are: squash, pad and crop."""

AHEAD = 2
"""Batches being decoded while one is encoded: the encoder never waits for a batch to be begun."""

MOST_DECODE_THREADS = 16

OnImages = Callable[[int, int], None]
"""Told the images and rejects done since it was last called."""


@dataclass(frozen=True)
class WorkOrder:
    """All that a worker is told about its job; small and picklable, since it travels to other machines."""

    output: str
    root: Path
    geometry: Geometry
    tokenizer: TokenizerConfig
    spec: Producer
    fingerprint: str
    dtype: ComputeDtype
    device: Device
    batch_size: int
    torch_threads: int
    decode_threads: int | None
    max_pixels: int


class SourceFailedError(Exception):
    """An image could not be read for a reason that is not the image's."""


@dataclass(frozen=True)
class Batch:
    """Images being decoded into their slots of `views_BVSSC`; `members` are their places in the unit."""

    views_BVSSC: npt.NDArray[np.uint8]
    members: list[int]
    pictures: list[Future[Picture | Reject]]


class Worker:
    """Turns units into shards, one after the other. The tokenizer is loaded for the first image that needs it."""

    def __init__(self, order: WorkOrder) -> None:
        self._order = order
        self._store = Store.open(order.output)
        threads = order.decode_threads or min(MOST_DECODE_THREADS, usable_cores())
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._tokenizer: Tokenizer | None = None
        self._name = f"{os.uname().nodename}:{os.getpid()}"

    def tokenize(self, unit: Unit, on_images: OnImages | None = None) -> UnitDone | UnitFailed:
        """Write the shard of a unit and return its record, or say why the source did not let it.

        Rejects are part of the record. Raises `StorageError` when the output refuses the shard and
        `EnvironmentProblem` when the device is out of memory; any other error is a bug and ends the job.
        """
        try:
            return self._tokenize(unit, on_images or _nobody)
        except SourceFailedError as error:
            return UnitFailed(unit.name, str(error))

    def close(self) -> None:
        """Stop the decode threads; images not yet begun are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _tokenize(self, unit: Unit, on_images: OnImages) -> UnitDone:
        began = time.monotonic()
        order, spec, column = self._order, self._order.spec, value_column(self._order.spec)
        ids: list[str] = unit.members["image_id"].to_pylist()
        source_rows: list[int] = unit.members["source_row"].to_pylist()
        length = VIEWS * spec.positions * spec.values
        codes_NL = np.zeros((len(ids), length), column.dtype)
        pictures: dict[int, Picture] = {}
        rejects: dict[int, RejectRow] = {}

        kept = Survivors.of(self._store, unit) if unit.rewrites else None
        if kept:
            kept.copy_into(unit.members, codes_NL, pictures, rejects, column=column.kind)
        copied = len(pictures) + len(rejects)
        todo = ~kept.unchanged if kept else np.ones(len(ids), bool)
        on_images(copied, len(rejects))

        waited = 0.0
        with closing(self._batches(ids, np.flatnonzero(todo).tolist())) as batches:
            for batch in batches:
                waiting = time.monotonic()
                results = [future.result() for future in batch.pictures]
                waited += time.monotonic() - waiting
                good = []
                for member, result in zip(batch.members, results, strict=True):
                    if isinstance(result, Picture):
                        pictures[member] = result
                        good.append(member)
                    else:
                        rejects[member] = _reject_row(ids[member], source_rows[member], result)
                if good:
                    codes_BL = self._encode(batch.views_BVSSC)
                    codes_NL[good] = codes_BL[np.asarray(good) % len(codes_BL)]
                on_images(len(results), len(results) - len(good))

        rows = sorted(pictures)
        codes_NL = codes_NL[rows]
        shard = self._write_shard(unit.name, [ids[row] for row in rows], [pictures[row] for row in rows], codes_NL)
        seconds = time.monotonic() - began
        record = CommitRecord(
            fingerprint=order.fingerprint,
            unit=unit.name,
            shard=shard,
            members=MemberColumns(**unit.members.to_pydict()),
            rejects=[rejects[row] for row in sorted(rejects)],
            usage=encode_usage(_histograms(codes_NL, spec)),
            views=VIEWS * len(rows),
            codes=0 if column.features else length * len(rows),
            numerics=kept.numerics if kept and not todo.any() else self._numerics(),
            seconds=round(seconds, 3),
        )
        metrics = UnitMetrics(
            images=len(ids),
            encoded=int(todo.sum()),
            copied=copied,
            rejected=len(rejects),
            seconds=round(seconds, 3),
            waited=round(waited, 3),
            worker=self._name,
        )
        return UnitDone(record, metrics)

    def _batches(self, ids: list[str], todo: list[int]) -> Generator[Batch, None, None]:
        """Batches with something to decode, the next ones being decoded while the caller has one."""
        per_batch = max(1, self._order.batch_size // VIEWS)
        groups: dict[int, list[int]] = {}
        for member in todo:
            groups.setdefault(member // per_batch, []).append(member)
        ahead: deque[Batch] = deque()
        try:
            for members in groups.values():
                ahead.append(self._begin(ids, members, per_batch))
                if len(ahead) > AHEAD:
                    yield ahead.popleft()
            while ahead:
                yield ahead.popleft()
        finally:
            for batch in ahead:
                for future in batch.pictures:
                    future.cancel()

    def _begin(self, ids: list[str], members: list[int], per_batch: int) -> Batch:
        edge = self._order.geometry.size
        views = np.zeros((per_batch, VIEWS, edge, edge, 3), np.uint8)
        pictures = [self._pool.submit(_load, self._order, ids[member], views[member % per_batch]) for member in members]
        return Batch(views, members, pictures)

    def _encode(self, views_BVSSC: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Codes of a batch, int32 (B, V*P*D), on the host; or features (B, V*P*n), bfloat16 as uint16 bits."""
        import torch

        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        try:
            codes_BPD = self._tokenizer.encode(torch.from_numpy(views_BVSSC.reshape(-1, *views_BVSSC.shape[2:])))
        except torch.OutOfMemoryError as error:
            raise EnvironmentProblem(
                f"the device has no memory for {self._order.batch_size} views at once: make batch_size smaller"
            ) from error
        if codes_BPD.dtype == torch.bfloat16:
            codes_BPD = codes_BPD.view(torch.uint16)
        codes: npt.NDArray[Any] = codes_BPD.cpu().numpy().reshape(len(views_BVSSC), -1)
        return codes

    def _load_tokenizer(self) -> Tokenizer:
        import torch

        from tokenize_stage.tokenizers import load

        order = self._order
        torch.set_num_threads(order.torch_threads)  # the same in every worker, so that sums are split the same way
        return load(order.tokenizer, order.spec, dtype=order.dtype, device=order.device)

    def _write_shard(
        self, unit: str, ids: list[str], pictures: list[Picture], codes_NL: npt.NDArray[Any]
    ) -> ShardEntry | None:
        if not ids:
            return None
        data = encode_shard(
            ShardData(
                image_ids=ids,
                sha256=[picture.sha256 for picture in pictures],
                widths=[picture.width for picture in pictures],
                heights=[picture.height for picture in pictures],
                view_boxes=[picture.boxes_V4 for picture in pictures],
                locators=[Locator(name, 0, picture.length) for name, picture in zip(ids, pictures, strict=True)],
                codes=codes_NL,
            ),
            fingerprint=self._order.fingerprint,
            unit=unit,
            code_dtype=codes_NL.dtype,
            feature_dtype=value_column(self._order.spec).features,
        )
        sha256 = hashlib.sha256(data).hexdigest()
        path = shard_name(unit, sha256)
        self._store.write(path, data)
        return ShardEntry(path=path, bytes=len(data), sha256=sha256, unit=unit, rows=len(ids))

    def _numerics(self) -> Numerics:
        return Numerics(
            device=device_name(self._order),
            torch=version("torch"),
            dtype=self._order.dtype,
            batch_size=self._order.batch_size,
        )


def _nobody(images: int, rejects: int) -> None:
    pass


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def device_name(order: WorkOrder) -> str:
    """The device of a worker as the numerics record names it."""
    import torch

    if order.device == "cuda" or (order.device == "auto" and torch.cuda.is_available()):
        return torch.cuda.get_device_name()
    return f"{os.uname().machine} cpu, {order.torch_threads} threads"


def _load(order: WorkOrder, image_id: str, views_VSSC: npt.NDArray[np.uint8]) -> Picture | Reject:
    """Read, decode and view one image into its slot. Runs in a thread; the libraries under it release the GIL."""
    try:
        data = with_retries(lambda: read_image(order.root, image_id), f"reading image {image_id} below {order.root}")
        image = decode(data, max_pixels=order.max_pixels)
        views, boxes = make_views(image, order.geometry)
    except Reject as reject:
        return reject
    except StorageError as error:
        raise SourceFailedError(str(error)) from error
    views_VSSC[:] = views
    height, width = image.shape[:2]
    return Picture(hashlib.sha256(data).hexdigest(), width, height, boxes, len(data))


def _reject_row(image_id: str, source_row: int, reject: Reject) -> RejectRow:
    return RejectRow(image_id=image_id, reason=reject.reason.value, message=reject.message, source_row=source_row)


def _histograms(codes_NL: npt.NDArray[Any], spec: Producer) -> list[npt.NDArray[np.int64]]:
    by_depth = codes_NL.reshape(-1, spec.values)
    return [np.bincount(by_depth[:, depth], minlength=size) for depth, size in enumerate(spec.codebook_sizes)]
