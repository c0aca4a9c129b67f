"""Images of a unit become views ahead of the encoder: in threads beside it, or wherever another `Decoder` has it done."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.anyres import most_views
from manifests.decode import decode
from manifests.errors import StorageError
from manifests.geometry import make_views
from manifests.images import UnitReader
from manifests.rejects import Reject
from tokenize_stage.order import WorkOrder
from tokenize_stage.outcomes import Picture
from tokenize_stage.retry import with_retries

AHEAD = 2
"""Batches being decoded while one is encoded: the encoder never waits for a batch to be begun."""

MOST_DECODE_THREADS = 16

_MOST_TOGETHER = 16
"""Images that a thread decodes before it hands them over: handing over costs as much as decoding a thumbnail."""


class SourceFailedError(Exception):
    """An image could not be read for a reason that is not the image's."""


@dataclass(frozen=True)
class Decoded:
    """What became of some images, in order: `views_NSS3`, uint8, are those of the pictures, one after the other."""

    outcomes: list[Picture | Reject]
    views_NSS3: npt.NDArray[np.uint8]


class Decoder(Protocol):
    """Decodes images of units, those that come next before they are asked for. Used from two threads at once."""

    def decode(self, members: pa.Table) -> Generator[Decoded, None, None]:
        """All images of `members` (columns of an inventory), in order, in groups of any size.

        A bounded number of groups is being decoded while the caller has one; closing the generator drops them.
        Raises `SourceFailedError` when an image could not be read.
        """
        ...

    def close(self) -> None:
        """Drop all that has not begun."""
        ...


class ThreadDecoder:
    """Decodes in threads of this process; the libraries that do the work release the interpreter lock."""

    def __init__(self, order: WorkOrder) -> None:
        self._order = order
        threads = order.decode_threads or min(MOST_DECODE_THREADS, usable_cores())
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        images = max(1, order.batch_size // most_views(order.geometry))
        self._together = min(_MOST_TOGETHER, max(1, images // threads))
        self._groups = max(threads, -(-images // self._together) * (1 + AHEAD))

    def decode(self, members: pa.Table) -> Generator[Decoded, None, None]:
        """See `Decoder`."""
        rows = range(members.num_rows)
        ahead: deque[Future[Decoded]] = deque()
        with UnitReader(self._order.images, members, rows) as reader:
            try:
                for first in range(0, len(rows), self._together):
                    group = rows[first : first + self._together]
                    ahead.append(self._pool.submit(decode_images, self._order, reader, group))
                    if len(ahead) == self._groups:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                wait([future for future in ahead if not future.cancel()])  # they use the reader

    def close(self) -> None:
        """See `Decoder`."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def decode_images(order: WorkOrder, reader: UnitReader, rows: Sequence[int]) -> Decoded:
    """Read, decode and view the images at some rows of a reader, one after the other."""
    outcomes: list[Picture | Reject] = []
    size = order.geometry.size
    views = [np.empty((0, size, size, 3), np.uint8)]
    for row in rows:
        try:
            picture, views_VSS3 = _view(order, _read(order, reader, row))
            outcomes.append(picture)
            views.append(views_VSS3)
        except Reject as reject:
            outcomes.append(reject)
    return Decoded(outcomes, np.concatenate(views))


def _read(order: WorkOrder, reader: UnitReader, row: int) -> bytes:
    try:
        return with_retries(lambda: reader.read(row), f"reading image {reader.name(row)} below {order.images.root}")
    except StorageError as error:
        raise SourceFailedError(str(error)) from error


def _view(order: WorkOrder, data: bytes) -> tuple[Picture, npt.NDArray[np.uint8]]:
    image = decode(data, max_pixels=order.max_pixels)
    views_VSS3, boxes_V4 = make_views(image, order.geometry)
    height, width = image.shape[:2]
    return Picture(hashlib.sha256(data).hexdigest(), width, height, boxes_V4, len(data)), views_VSS3
