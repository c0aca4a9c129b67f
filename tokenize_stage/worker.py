"""One unit becomes one shard: its images are decoded, encoded in batches of a fixed shape, and written.

Both engines run exactly this, and nothing in the shard depends on how many workers or threads there are: see
`tokenize_stage.batches`. Two threads may each have a unit in a worker: the second's first batches are being decoded
while the first has the encoder, and they are encoded while the first's shard is compressed and written.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manifests.commits import CommitRecord, MemberColumns, encode_usage
from manifests.images import UnitReader
from manifests.rejects import Reject
from manifests.shards import value_column
from manifests.storage import Store
from tokenize_stage.batches import ARRAYS, Batch, fill_batches
from tokenize_stage.decoding import Decoded, Decoder, SourceFailedError, ThreadDecoder
from tokenize_stage.encoding import Encoded, Encoder
from tokenize_stage.order import WorkOrder
from tokenize_stage.outcomes import Picture, UnitDone, UnitFailed, UnitMetrics
from tokenize_stage.survivors import Copied, Survivors
from tokenize_stage.table_rows import take_rows
from tokenize_stage.unit_rows import UnitRows
from tokenize_stage.units import Unit

UNITS_AT_ONCE = 2
"""Units that an engine keeps in a worker: one that has the encoder, and one that is about to or has had it."""

OnImages = Callable[[int, int], None]
"""Told the images and rejects done since it was last called, from the thread that called `Worker.tokenize`."""


class Stopped(Exception):
    """The worker was closed while it worked on a unit, which stays undone."""


@dataclass
class Timing:
    """`began`: when a unit had the worker to itself; the seconds the encoder then stood still, and before it."""

    began: float
    waited: float = 0.0
    gap: float | None = None

    def took(self, encoded: Encoded) -> None:
        """Count what the encoder stood still before a batch of the unit."""
        since = encoded.began - self.began
        self.waited += max(0.0, since if encoded.idle is None else min(encoded.idle, since))
        if self.gap is None:
            self.gap = encoded.idle or 0.0


class Worker:
    """Turns units into shards, with a decoder of its own or another one, which it closes."""

    def __init__(self, order: WorkOrder, decoder: Decoder | None = None) -> None:
        self._order = order
        self._store = Store.open(order.output)
        self._decoder = decoder or ThreadDecoder(order)
        self._encoder = Encoder(order)
        self._closed = threading.Event()
        self._name = f"{os.uname().nodename}:{os.getpid()}"

    def tokenize(self, unit: Unit, on_images: OnImages | None = None) -> UnitDone | UnitFailed:
        """Write the shard of a unit and return its record, or say why the source did not let it.

        Rejects are part of the record. May be called by `UNITS_AT_ONCE` threads. Raises `StorageError` when the output
        refuses the shard and `EnvironmentProblem` when the device is out of memory; any other error is a bug and ends
        the job. After `close` it raises `Stopped` or whatever the closing broke.
        """
        try:
            return self._tokenize(unit, on_images or _nobody)
        except SourceFailedError as error:
            return UnitFailed(unit.name, str(error))

    def close(self) -> None:
        """Stop: wait for the images and the batch in work, drop the others. Units in `tokenize` end there."""
        self._closed.set()
        self._decoder.close()
        self._encoder.close()

    def _tokenize(self, unit: Unit, on_images: OnImages) -> UnitDone:
        timing = Timing(time.monotonic())
        order, column, count = self._order, value_column(self._order.spec), unit.members.num_rows
        rows = UnitRows(unit, order)
        kept = Survivors.of(self._store, unit, column.kind) if unit.rewrites else Survivors({}, [])
        copied = kept.by_member
        todo = [member for member in range(count) if member not in copied]

        members = take_rows(unit.members, np.array(todo, np.int64)) if copied else unit.members
        with closing(self._decoder.decode(members)) as groups:
            images = _stream(rows, count, copied, groups)
            with closing(fill_batches(images, order.batch_size, order.geometry.size)) as batches:
                self._encode(batches, rows, timing, on_images)
        with UnitReader(order.images, unit.members, [], carried=sorted(rows.pictures)) as reader:
            shard = rows.write_shard(self._store, reader)
        seconds = round(time.monotonic() - timing.began, 3)
        numerics, copied_numerics = kept.numerics_with(self._encoder.numerics() if todo else None)
        record = CommitRecord(
            fingerprint=order.fingerprint,
            unit=unit.name,
            shard=shard,
            members=MemberColumns.of_table(unit.members),
            rejects=rows.reject_rows(),
            usage=encode_usage(rows.histograms()),
            views=rows.views,
            codes=0 if column.features else rows.views * rows.values_NL.shape[1],
            numerics=numerics,
            copied_numerics=copied_numerics,
            seconds=seconds,
        )
        metrics = UnitMetrics(
            images=count,
            encoded=len(todo),
            copied=len(copied),
            rejected=len(rows.rejects),
            seconds=seconds,
            waited=round(timing.waited, 3),
            worker=self._name,
            gap=round(timing.gap or 0.0, 3),
            device_memory=self._encoder.peak_memory(),
        )
        return UnitDone(record, metrics)

    def _encode(
        self, batches: Generator[Batch, None, None], rows: UnitRows, timing: Timing, on_images: OnImages
    ) -> None:
        """Encode the batches in the unit's turn: one is being encoded and one ready while the next is put together."""
        running: deque[tuple[Batch, Future[Encoded]]] = deque()
        first = next(batches, None)  # there before the encoder is asked for
        if first is not None:
            with self._turn(timing):
                running.append(self._begin(first))
                for batch in batches:
                    running.append(self._begin(batch))
                    if len(running) == ARRAYS - 1:
                        self._take(running.popleft(), rows, timing)
                        on_images(*rows.news())
        for batch_and_values in running:  # the next unit's first batch is behind them already
            self._take(batch_and_values, rows, timing)
        on_images(*rows.news())

    @contextmanager
    def _turn(self, timing: Timing) -> Generator[None, None, None]:
        if not self._encoder.turn.acquire(blocking=False):
            self._encoder.turn.acquire()
            timing.began = time.monotonic()
        try:
            yield
        finally:
            self._encoder.turn.release()

    def _begin(self, batch: Batch) -> tuple[Batch, Future[Encoded]]:
        if self._closed.is_set():
            raise Stopped
        return batch, self._encoder.begin(batch.views_BSS3)

    def _take(self, running: tuple[Batch, Future[Encoded]], rows: UnitRows, timing: Timing) -> None:
        """Wait for a batch and keep the values of its views."""
        batch, future = running
        encoded = future.result()
        timing.took(encoded)
        rows.values_NL[batch.first + np.flatnonzero(batch.filled_B)] = encoded.values_BL[batch.filled_B]


def _nobody(images: int, rejects: int) -> None:
    pass


def _stream(
    rows: UnitRows, members: int, copied: Mapping[int, Copied], groups: Iterable[Decoded]
) -> Generator[npt.NDArray[np.uint8] | int, None, None]:
    """The views of the unit's members in order, or the slots that a member leaves empty; `rows` hears each outcome."""
    decoded = _one_by_one(groups)
    for member in range(members):
        if member in copied:
            yield rows.add_copied(member, copied[member])
        else:
            outcome, views_VSS3 = next(decoded)
            slots = rows.add(member, outcome)
            yield views_VSS3 if isinstance(outcome, Picture) else slots


def _one_by_one(
    groups: Iterable[Decoded],
) -> Generator[tuple[Picture | Reject, npt.NDArray[np.uint8]], None, None]:
    for group in groups:
        end = 0
        for outcome in group.outcomes:
            start, end = end, end + (len(outcome.boxes_V4) if isinstance(outcome, Picture) else 0)
            yield outcome, group.views_NSS3[start:end]
