"""A worker as a Ray actor, and its decoder that lends cores of other nodes. Ray's own metrics are counted here."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Generator
from typing import Any

import pyarrow as pa
import ray
from ray.util.metrics import Counter

from manifests.anyres import most_views
from manifests.errors import AsvrError
from manifests.images import UnitReader
from tokenize_stage.decoding import Decoded, SourceFailedError, decode_images
from tokenize_stage.engines.in_flight import Counts, InFlight
from tokenize_stage.order import WorkOrder
from tokenize_stage.outcomes import UnitDone, UnitFailed, UnitMetrics
from tokenize_stage.units import Unit
from tokenize_stage.worker import Worker

DECODE_TASKS = 8
"""Batches that a worker has in the hands of the cluster at once, unless `decode_threads` says otherwise."""

DECODE_RETRIES = 5
"""How often Ray begins a decode task again whose node died."""


class UnitActor:
    """Tokenizes two units at a time, so that the encoder goes from one to the next; a third thread says how far they are.

    An error the user can repair travels as a value, so that it arrives as itself; a bug is raised here and
    stops the job.
    """

    def __init__(self, order: WorkOrder, decode: str) -> None:
        self._order, self._decode = order, decode
        self._in_flight = InFlight()
        self._meters = Meters()

    def start(self) -> AsvrError | None:
        """Make the worker."""
        decoder = ClusterDecoder(self._order) if self._decode == "cluster" else None
        try:
            self._worker = Worker(self._order, decoder)
        except AsvrError as error:
            return error
        return None

    def tokenize(self, unit: Unit) -> UnitDone | UnitFailed | AsvrError:
        try:
            outcome = self._worker.tokenize(unit, self._in_flight.listener(unit.name))
        except AsvrError as error:
            return error
        finally:
            self._in_flight.finish(unit.name)
        if isinstance(outcome, UnitDone):
            self._meters.count(outcome.metrics)
        return outcome

    def counts(self) -> dict[str, Counts]:
        """How far the units in hand are."""
        return self._in_flight.counts()


class Meters:
    """Ray's metrics of a worker, which its dashboard and Prometheus show for each worker."""

    def __init__(self) -> None:
        keys = ("worker",)
        self._counters = {
            "images": Counter("asvr_images", "Images that are done, rejects among them", keys),
            "rejected": Counter("asvr_rejects", "Images that were rejected", keys),
            "seconds": Counter("asvr_unit_seconds", "Seconds spent on units", keys),
            "waited": Counter("asvr_wait_seconds", "Seconds the encoder stood still for decoded images", keys),
        }

    def count(self, metrics: UnitMetrics) -> None:
        for field, counter in self._counters.items():
            if (value := getattr(metrics, field)) > 0:  # Ray refuses zero
                counter.inc(value, {"worker": metrics.worker})


class ClusterDecoder:
    """Decodes in Ray tasks of one core each, spread over the nodes: names go out and uint8 views come back.

    Ray begins a task again whose node died, and makes its views again if they were lost with it.
    """

    def __init__(self, order: WorkOrder) -> None:
        self._order = ray.put(order)
        self._rows = max(1, order.batch_size // most_views(order.geometry))
        self._ahead = order.decode_threads or DECODE_TASKS

    def decode(self, members: pa.Table) -> Generator[Decoded, None, None]:
        """The images of `members`, in order, a batch at a time."""
        starts = deque(range(0, members.num_rows, self._rows))
        begun: deque[Any] = deque()
        try:
            while starts or begun:
                while starts and len(begun) < self._ahead:
                    group = Unit("", members.slice(starts.popleft(), self._rows))
                    begun.append(_decode_task().remote(self._order, group))
                decoded = ray.get(begun[0])
                begun.popleft()
                if isinstance(decoded, SourceFailedError | AsvrError):
                    raise decoded
                yield decoded
        finally:
            for ref in begun:
                ray.cancel(ref, force=False)

    def close(self) -> None:
        """Nothing is kept between units."""


@functools.cache
def _decode_task() -> Any:
    return ray.remote(num_cpus=1, scheduling_strategy="SPREAD", max_retries=DECODE_RETRIES)(_decode)


def _decode(order: WorkOrder, group: Unit) -> Decoded | SourceFailedError | AsvrError:
    """Runs on any node. What the storage refused is a value, as in `UnitActor`."""
    rows = range(group.members.num_rows)
    try:
        with UnitReader(order.images, group.members, rows) as reader:
            return decode_images(order, reader, rows)
    except (SourceFailedError, AsvrError) as error:
        return error
