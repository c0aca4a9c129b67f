"""`progress.json`: how far a job is that runs now, for whoever asks from another terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from pydantic import TypeAdapter, ValidationError

from manifests.storage import Store

PROGRESS_NAME = "progress.json"


@dataclass(frozen=True)
class JobProgress:
    """Images and units done out of all, including those that earlier runs committed.

    `rate` (images/s) and `eta` (seconds; None while unknown) are of this run's last minute, without its warm-up.
    `wait_share` is the part of the workers' time in which the encoder stood still for decoded images. `by_worker` has
    the images/s of the last unit of each worker that has finished one; `workers` counts those that are up.
    """

    done: int
    total: int
    rejected: int
    units_done: int
    units_total: int
    rate: float
    eta: float | None
    wait_share: float
    workers: int = 1
    by_worker: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LiveProgress:
    """What a driver wrote about its job, and when (UTC, ISO 8601)."""

    written_at: str
    progress: JobProgress

    @property
    def age(self) -> float:
        """Seconds since it was written, by this machine's clock."""
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(self.written_at)).total_seconds())


_LIVE = TypeAdapter(LiveProgress)


def write_progress(store: Store, progress: JobProgress) -> None:
    """Replace the file; a reader sees the old one or the new one."""
    live = LiveProgress(datetime.now(UTC).isoformat(timespec="seconds"), progress)
    store.write(PROGRESS_NAME, json.dumps(asdict(live)).encode() + b"\n")


def read_progress(store: Store) -> LiveProgress | None:
    """What the driver wrote last; None where there is nothing, or nothing that this version can read."""
    if not store.exists(PROGRESS_NAME):
        return None
    try:
        return _LIVE.validate_json(store.read(PROGRESS_NAME))
    except ValidationError:
        return None
