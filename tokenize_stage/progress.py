"""How far a job is: what the command line shows, `progress.json` tells other terminals and `metrics.jsonl` keeps."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime

from manifests.live import PROGRESS_NAME, JobProgress, write_progress
from manifests.storage import Store
from tokenize_stage.engines.in_flight import Counts, Running
from tokenize_stage.outcomes import UnitDone

__all__ = ["METRICS_NAME", "JobProgress", "Progress", "Tracker"]

METRICS_NAME = "metrics.jsonl"

RATE_SECONDS = 60.0
"""The rate is that of the last so many seconds."""

FILE_SECONDS, FILE_SECONDS_FAR = 2.0, 15.0
"""How often `progress.json` is written, on local disk and on an object store."""

MUCH_WAITING, LONG_WAITING = 0.2, 10.0
"""Share of the workers' time and number of seconds from which on waiting for images is worth a hint."""

Progress = Callable[[JobProgress], None]

_log = logging.getLogger(__name__)


class Tracker:
    """Counts what comes in, tells the listener and `progress.json`, and appends a line to `metrics.jsonl` for each unit."""

    def __init__(
        self,
        store: Store,
        listener: Progress | None,
        *,
        done: int,
        total: int,
        units_done: int,
        units_total: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._listener = store, listener
        self._before, self._total = done, total
        self._units_done, self._units_total = units_done, units_total
        self._finished = 0  # images of finished units of this run
        self._running: Mapping[str, Counts] = {}
        self._workers = 0
        self._by_worker: dict[str, float] = {}
        self._rejected = 0
        self._busy = self._waited = 0.0
        self._seen: deque[tuple[float, int]] = deque()  # from the first image on: what comes before is warm-up
        self._clock = clock
        self._write_every = FILE_SECONDS if store.is_local else FILE_SECONDS_FAR
        self._written = float("-inf")
        self._hinted = False

    def start(self, rejected: int) -> None:
        """The count of rejects that earlier runs committed."""
        self._rejected = rejected
        self._tell()

    def on_running(self, running: Running) -> None:
        """How far the unfinished units are."""
        self._running, self._workers = running.units, running.workers
        self._tell()

    def on_unit(self, done: UnitDone, rejected: int) -> None:
        """A committed unit; `rejected` is the count over the whole set now."""
        metrics, unit = done.metrics, done.record.unit
        self._finished += metrics.images
        self._units_done += 1
        self._rejected = rejected
        self._running = {name: counts for name, counts in self._running.items() if name != unit}
        self._busy += metrics.seconds
        self._waited += metrics.waited
        rate = metrics.images / max(metrics.seconds, 1e-3)
        self._by_worker[metrics.worker] = round(rate, 2)
        self._workers = max(self._workers, 1)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "unit": unit,
            **asdict(metrics),
            "images_per_second": round(rate, 2),
            "wait_share": round(metrics.waited / max(metrics.seconds, 1e-3), 4),
        }
        self._store.append(METRICS_NAME, json.dumps(line).encode() + b"\n")
        self._hint()
        self._tell()

    def close(self) -> None:
        """The job is done: there is nothing to watch any more."""
        self._store.delete(PROGRESS_NAME)

    def now(self) -> JobProgress:
        """The state of this moment."""
        mine = self._finished + sum(images for images, _ in self._running.values())
        done = min(self._before + mine, self._total)
        rate = self._rate(mine)
        return JobProgress(
            done=done,
            total=self._total,
            rejected=self._rejected + sum(rejects for _, rejects in self._running.values()),
            units_done=self._units_done,
            units_total=self._units_total,
            rate=round(rate, 2),
            eta=round((self._total - done) / rate, 1) if rate else None,
            wait_share=round(self._waited / self._busy, 4) if self._busy else 0.0,
            workers=self._workers,
            by_worker=dict(self._by_worker),
        )

    def _rate(self, mine: int) -> float:
        now = self._clock()
        if not mine:
            return 0.0
        if self._seen and mine < self._seen[-1][1]:  # a worker was lost, and its images with it
            self._seen.clear()
        self._seen.append((now, mine))
        while len(self._seen) > 2 and now - self._seen[0][0] > RATE_SECONDS:
            self._seen.popleft()
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def _tell(self) -> None:
        progress = self.now()
        if self._clock() - self._written >= self._write_every:
            self._written = self._clock()
            write_progress(self._store, progress)
        if self._listener is not None:
            self._listener(progress)

    def _hint(self) -> None:
        if self._hinted or self._waited < LONG_WAITING or self._waited < MUCH_WAITING * self._busy:
            return
        self._hinted = True
        _log.warning(
            "the encoder stands still %.0f %% of the time, waiting for decoded images: give each worker more cores "
            "(ray.cpus_per_worker, decode_threads) or, where other nodes have free ones, set ray.decode: cluster",
            100 * self._waited / self._busy,
        )
