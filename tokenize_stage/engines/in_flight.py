"""Which units are being worked on in this process, and how far each is; several threads write, one reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokenize_stage.worker import OnImages

Counts = tuple[int, int]
"""Images done, and how many of those are rejects."""


@dataclass(frozen=True)
class Running:
    """What is at work at a moment: the number of workers that are up, and the unfinished units by name."""

    workers: int
    units: Mapping[str, Counts]


OnRunning = Callable[[Running], None]


class InFlight:
    """The units in hand of one process."""

    def __init__(self) -> None:
        self._counts: dict[str, Counts] = {}
        self._lock = threading.Lock()

    def listener(self, unit: str) -> OnImages:
        """What the worker is to call with the images of this unit."""

        def hear(images: int, rejects: int) -> None:
            with self._lock:
                done, rejected = self._counts.get(unit, (0, 0))
                self._counts[unit] = (done + images, rejected + rejects)

        return hear

    def finish(self, unit: str) -> None:
        """The unit is done with, however it ended."""
        with self._lock:
            self._counts.pop(unit, None)

    def counts(self) -> dict[str, Counts]:
        """How far each unit is now."""
        with self._lock:
            return dict(self._counts)
