"""How far long work is: one line that rewrites itself on a terminal, a plain line every ten seconds in a log."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TextIO

from pipeline.console import LOG, plain

LIVE_SECONDS = 0.2
LOG_SECONDS = 10.0
RATE_SECONDS = 30.0
"""The rate is that of the last so many seconds, so that it follows a job that speeds up or stalls."""


class ProgressLine:
    """Progress of one piece of work, `with ProgressLine("vqa") as progress: progress.update(done, total)`.

    What was done before the first update (a resumed job) counts for `done` but not for the rate.
    """

    def __init__(
        self,
        title: str,
        *,
        noun: str = "images",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.noun, self.clock = plain(title, 40), noun, clock
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._seen: deque[tuple[float, int]] = deque()
        self._shown_at = float("-inf")
        self._last = ""
        self._finished = False

    def update(
        self, done: int, total: int, rejected: int = 0, *, rate: float | None = None, notes: Sequence[str] = ()
    ) -> None:
        """Say that `done` of `total` are finished, `rejected` of them as rejects; shown only as often as is useful.

        `rate` (a second) is the caller's own, if it knows better; `notes` follow it on the line.
        """
        now = self.clock()
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > RATE_SECONDS:
            self._seen.popleft()
        self._last = self._text(done, total, rejected, self._rate() if rate is None else rate, notes)
        finished = done >= total and not self._finished
        self._finished = done >= total
        if finished or now - self._shown_at >= (LIVE_SECONDS if self.live else LOG_SECONDS):
            self._shown_at = now
            self._show()

    def _rate(self) -> float:
        (start, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - start) if now > start else 0.0

    def _text(self, done: int, total: int, rejected: int, rate: float, notes: Sequence[str]) -> str:
        parts = [f"{self.title}: {done:,}/{total:,} {self.noun}"]
        if total:
            parts[0] += f" ({100 * done // total}%)"
        if rate > 0:
            parts.append(f"{rate:,.1f} {self.noun}/s")
        parts += notes
        if rejected:
            parts.append(f"{rejected:,} rejected")
        if rate > 0 and done < total:
            parts.append(f"ETA {duration((total - done) / rate)}")
        return ", ".join(parts)

    def _show(self) -> None:
        if not self.live:
            self.stream.write(f"{self._last}\n")
        else:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r{self._last[:width]}\x1b[K")
            LOG.live = True
        self.stream.flush()

    def close(self) -> None:
        """Leave the last state standing on a line of its own."""
        if self.live and LOG.live:
            self._show()
            self.stream.write("\n")
            self.stream.flush()
        LOG.live = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def duration(seconds: float) -> str:
    """'42 s', '3 min 05 s', '2 h 07 min' or '5 d 03 h'."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
