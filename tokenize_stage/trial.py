"""A trial run: some of the plan's units, and what they say of the whole.

The units are whole ones, spread evenly over the source, so that they are the very units which the full run would make: it
takes them over and makes the rest, and the result is the same as without a trial. The set is not complete
afterwards: no manifest is written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tokenize_stage.commit_loop import Work
from tokenize_stage.progress import JobProgress, Progress


@dataclass(frozen=True)
class Trial:
    """What a trial measured. `rate`: images/s once the workers were warm; `warm` tells whether there was time for that.

    `left`: the images that the plan has beyond those of the trial; `total`: those of the whole set.
    """

    work: Work
    left: int
    total: int
    rate: float
    warm: bool
    seconds: float

    @property
    def seconds_left(self) -> float:
        """How long the images that are left will take at this rate, with as many workers."""
        return self.left / self.rate if self.rate else 0.0

    @property
    def total_bytes(self) -> float:
        """Shards of the whole set, if its images are like these, rejects included."""
        return self.work.bytes / max(self.work.images, 1) * self.total


class Stopwatch:
    """Listens to the progress of a run, and passes it on: the rate from the first image that is done to the last one.

    What comes before the first image is the start of the workers and the loading of the model.
    """

    def __init__(self, listener: Progress | None) -> None:
        self._listener = listener
        self._began = time.monotonic()
        self._before: int | None = None
        self._first: tuple[float, int] | None = None
        self._last = (self._began, 0)

    def __call__(self, now: JobProgress) -> None:
        """One state of the run; the first one comes before any image is done."""
        at = time.monotonic()
        if self._before is None:
            self._before = now.done
        mine = now.done - self._before
        if mine > self._last[1]:
            self._last = (at, mine)
            self._first = self._first or self._last
        if self._listener:
            self._listener(now)

    def measured(self, work: Work, *, left: int, total: int) -> Trial:
        """What came of it."""
        at, images = self._last
        start, before = self._first or (self._began, 0)
        warm = images > before and at > start
        seconds = at - start if warm else time.monotonic() - self._began
        rate = (images - before if warm else work.images) / seconds
        return Trial(work, left, total, rate, warm, time.monotonic() - self._began)
