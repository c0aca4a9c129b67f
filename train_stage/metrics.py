"""What a step reports: one JSON line per step in `PHASE/metrics.jsonl`, and now and then a line on the console."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from manifests.atomic import storage_errors, write_atomically

log = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all ranks.

    loss is what was minimised: text_loss + weight * visual_loss. visual_loss is the mean of visual_loss_depth, and
    None where the phase has no visual loss; text_loss is per supervised token, visual losses per position.
    """

    step: int
    epoch: int
    loss: float
    text_loss: float
    visual_loss: float | None
    visual_loss_depth: list[float]
    visual_accuracy_depth: list[float]
    grad_norm: float
    lr: float
    samples: int
    tokens: int
    text_tokens: int
    visual_positions: int
    seconds: float
    data_wait: float


def line_of(values: Mapping[str, Any]) -> str:
    """A JSON line, its floats with 10 significant digits."""
    return json.dumps({key: _rounded(value) for key, value in values.items()}, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.10g}")
    return [_rounded(item) for item in value] if isinstance(value, list) else value


class MetricsLog:
    """Appends steps to a phase's metrics; what an earlier run said about steps after `last_step` is taken out first."""

    def __init__(self, folder: Path, last_step: int, total_steps: int, log_every: int, *, writes: bool) -> None:
        """`writes` is true on one rank; on the others all of this does nothing."""
        self.path = folder / METRICS_NAME
        self.total_steps = total_steps
        self.log_every = log_every
        self._first_step = last_step + 1
        self._started = time.monotonic()
        self._file: TextIO | None = None
        if writes:
            with storage_errors("write", self.path):
                kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] <= last_step]
                write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
                self._file = self.path.open("a", encoding="utf-8")

    def add(self, metrics: StepMetrics) -> None:
        """Write a step down, and say it if it is the first, the last or the `log_every`-th."""
        if self._file is None:
            return
        values = {**vars(metrics), "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        with storage_errors("write", self.path):
            self._file.write(line_of(values) + "\n")
            self._file.flush()
        if metrics.step in (self._first_step, self.total_steps) or metrics.step % self.log_every == 0:
            log.info("%s", self._console(metrics))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _console(self, m: StepMetrics) -> str:
        done = m.step - self._first_step + 1
        pace = (time.monotonic() - self._started) / done
        parts = [f"step {m.step}/{self.total_steps}", f"loss {m.loss:.4f}", f"text {m.text_loss:.4f}"]
        if m.visual_loss is not None:
            parts.append(f"visual {m.visual_loss:.4f}")
        parts += [
            f"grad {m.grad_norm:.3f}",
            f"lr {m.lr:.2e}",
            f"{pace:.2f} s/step",
            f"waiting for data {m.data_wait:.0%}",
            f"left {_clock(pace * (self.total_steps - m.step))}",
        ]
        return "  ".join(parts)


def _whole_lines(path: Path) -> list[str]:
    """The complete lines of a file; a line that a killed process left unfinished does not count."""
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
