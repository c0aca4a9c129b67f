"""When a run ends before its last step: at a signal, at its time limit, or after so many steps. Torch-free.

A signal only raises a flag. The ranks look at it together after each step, so that all of them end after the same one,
and what that step did is saved.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from manifests.errors import TimeLimitReached

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Stop:
    """Why a run ends early, and the exit code that says so."""

    reason: str
    exit_code: int


class Adds(Protocol):
    """What adds numbers up over the ranks: `train_stage.ranks.Ranks`."""

    def sum(self, values: Sequence[float]) -> list[float]: ...


class Stopper:
    """Knows after each step whether the run goes on; the same answer on every rank.

    Args:
        max_steps: steps that this run may make, over all phases.
        minutes: from now; the first step that ends later is the last one.
    """

    def __init__(self, max_steps: int | None = None, minutes: float | None = None) -> None:
        self._max_steps, self._minutes = max_steps, minutes
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._steps = 0
        self._received: set[int] = set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as a wish to end after the step; at other times they end the process at once, as ever."""

        def note(number: int, _frame: FrameType | None) -> None:
            self._received.add(number)
            log.info("%s: the run ends after this step, and is saved", signal.Signals(number).name)

        before = [(number, signal.signal(number, note)) for number in SIGNALS]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def after_step(self, ranks: Adds) -> Stop | None:
        """Count a step, and say why the run ends after it, if it does. Collective."""
        self._steps += 1
        late = self._deadline is not None and time.monotonic() >= self._deadline
        *signals, over = ranks.sum([*(number in self._received for number in SIGNALS), late])
        for number, count in zip(SIGNALS, signals, strict=True):
            if count:
                return Stop(f"{number.name} was received", 128 + number)
        if over:
            return Stop(f"the time limit of {self._minutes:g} minutes is reached", TimeLimitReached.exit_code)
        if self._steps == self._max_steps:
            return Stop(f"{self._steps} steps were asked for", 0)
        return None
