"""How far a job is: what the command line shows and `metrics.jsonl` keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from manifests.storage import Store
from tokenize_stage.outcomes import UnitDone

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class JobProgress:
    """Images and units done out of all, including those that earlier runs committed.

    `rate` (images/s) and `eta` (seconds; None while unknown) are of this run. `wait_share` is the part of the
    workers' time in which the encoder stood still for decoded images.
    """

    done: int
    total: int
    rejected: int
    units_done: int
    units_total: int
    rate: float
    eta: float | None
    wait_share: float


Progress = Callable[[JobProgress], None]


class Tracker:
    """Counts what comes in, tells the listener, and appends a line to `metrics.jsonl` for each unit."""

    def __init__(
        self, store: Store, listener: Progress | None, *, done: int, total: int, units_done: int, units_total: int
    ) -> None:
        self._store, self._listener = store, listener
        self._before, self._total = done, total
        self._units_done, self._units_total = units_done, units_total
        self._began = time.monotonic()
        self._finished = 0  # images of finished units of this run
        self._current = 0  # images of the unfinished one
        self._rejected = self._current_rejected = 0
        self._busy = self._waited = 0.0

    def on_images(self, images: int, rejects: int) -> None:
        """Images of a unit that is still being worked on."""
        self._current += images
        self._current_rejected += rejects
        self.tell()

    def on_unit(self, done: UnitDone, rejected: int) -> None:
        """A committed unit; `rejected` is the count over the whole set now."""
        metrics = done.metrics
        self._finished += metrics.images
        self._units_done += 1
        self._rejected, self._current, self._current_rejected = rejected, 0, 0
        self._busy += metrics.seconds
        self._waited += metrics.waited
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "unit": done.record.unit,
            **asdict(metrics),
            "images_per_second": round(metrics.images / max(metrics.seconds, 1e-3), 2),
            "wait_share": round(metrics.waited / max(metrics.seconds, 1e-3), 4),
        }
        self._store.append(METRICS_NAME, json.dumps(line).encode() + b"\n")
        self.tell()

    def start(self, rejected: int) -> None:
        """The count of rejects that earlier runs committed."""
        self._rejected = rejected
        self.tell()

    def tell(self) -> None:
        """Call the listener with the state of this moment."""
        if self._listener is None:
            return
        mine = self._finished + self._current
        rate = mine / max(time.monotonic() - self._began, 1e-6)
        done = self._before + mine
        self._listener(
            JobProgress(
                done=done,
                total=self._total,
                rejected=self._rejected + self._current_rejected,
                units_done=self._units_done,
                units_total=self._units_total,
                rate=rate,
                eta=(self._total - done) / rate if mine else None,
                wait_share=self._waited / self._busy if self._busy else 0.0,
            )
        )
