"""What a step reports: one JSON line per step in `PHASE/metrics.jsonl`, and now and then a line on the console."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import torch

from manifests.atomic import storage_errors, write_atomically
from train_stage.flops import FlopModel, Work, peak_flops, utilisation

log = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class TermMetrics:
    """One term of the visual loss in a step, per target (a position that counts), before its weight.

    loss is the mean of loss_depth, which has one entry for terms without depths; accuracy_depth is empty for those.
    """

    loss: float
    loss_depth: list[float]
    accuracy_depth: list[float]
    targets: int


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all ranks.

    loss is what was minimised: text_loss + visual_loss. visual_loss is the sum of weight * loss over `objectives`, the
    terms by name, and None where the phase has none; text_loss is per supervised token. tokens, pairs (tokens squared,
    summed over samples) and views are those of samples; padding is the share of the computed tokens that are none.
    memory is the most that a rank has held so far, in bytes; data_wait the share of `seconds` in which the first rank
    waited for its micro-batches.
    """

    step: int
    epoch: int
    loss: float
    text_loss: float
    visual_loss: float | None
    objectives: dict[str, TermMetrics]
    grad_norm: float
    lr: float
    samples: int
    tokens: int
    text_tokens: int
    pairs: int
    views: int
    padding: float
    memory: int
    seconds: float
    data_wait: float


_NONE: Mapping[str, float] = {}


@dataclass(frozen=True)
class Meter:
    """What a step's counts and seconds say of speed, given the model's FLOPs and the devices that share them.

    `own_lr` has the parts whose peak learning rate is another than the phase's, as a multiple of it.

    mfu = FLOPs of the step by `train_stage.flops` / (seconds * devices * a device's dense bfloat16 FLOP/s). It is None
    where that is not known, and waiting for data counts against it.
    """

    flops: FlopModel
    devices: int
    peak: float | None
    own_lr: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, flops: FlopModel, devices: int, device: torch.device, precision: str, own_lr: Mapping[str, float] = _NONE
    ) -> Meter:
        """The meter of a run whose ranks each have a device like this one."""
        known = device.type == "cuda" and precision == "bfloat16"
        return cls(flops, devices, peak_flops(torch.cuda.get_device_name(device)) if known else None, own_lr)

    def rates(self, m: StepMetrics) -> dict[str, float]:
        """The learning rates of a step that are not the phase's, by part."""
        return {part: m.lr * times for part, times in self.own_lr.items()}

    def __call__(self, m: StepMetrics) -> dict[str, float | None]:
        """flops, tokens_per_second, views_per_second and mfu of a step."""
        targets = {name: term.targets for name, term in m.objectives.items()}
        flops = self.flops(Work(m.tokens, m.pairs, m.text_tokens, m.views, targets))
        return {
            "flops": flops,
            "tokens_per_second": m.tokens / m.seconds,
            "views_per_second": m.views / m.seconds,
            "mfu": utilisation(flops, m.seconds, self.devices, self.peak),
        }


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: on a GPU as torch allocated them, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def charted(m: StepMetrics, speed: Mapping[str, float | None]) -> dict[str, float]:
    """A step's numbers by the names they have in TensorBoard, W&B and CSV files."""
    values: dict[str, float | None] = {"loss/all": m.loss, "loss/text": m.text_loss, "loss/visual": m.visual_loss}
    for name, term in m.objectives.items():
        values[f"loss/{name}"] = term.loss
        if len(term.loss_depth) > 1:
            values |= {f"loss/{name}/depth_{d}": loss for d, loss in enumerate(term.loss_depth)}
        values |= {f"accuracy/{name}/depth_{d}": share for d, share in enumerate(term.accuracy_depth)}
    values |= {"optimizer/grad_norm": m.grad_norm, "optimizer/lr": m.lr, "memory/peak_gib": m.memory / 2**30}
    values |= {f"speed/{name}": value for name, value in speed.items() if name != "flops"}
    values |= {"speed/seconds": m.seconds, "speed/data_wait": m.data_wait, "speed/padding": m.padding}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class ValidationMetrics:
    """The losses on a phase's held-out samples after a step; every field as in `StepMetrics`.

    In `metrics.jsonl` a record of its own, with `"kind": "validation"`, after that of its step.
    """

    step: int
    loss: float
    text_loss: float
    visual_loss: float | None
    objectives: dict[str, TermMetrics]
    samples: int
    tokens: int
    text_tokens: int
    seconds: float


VALIDATION = "validation"
"""`kind` of the records of validations; those of steps have no `kind`."""


def line_of(values: Mapping[str, Any]) -> str:
    """A JSON line, its floats with 10 significant digits."""
    return json.dumps({key: _rounded(value) for key, value in values.items()}, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


class MetricsLog:
    """Appends steps to a phase's metrics; what an earlier run said about steps after `last_step` is taken out first."""

    def __init__(
        self,
        folder: Path,
        last_step: int,
        total_steps: int,
        log_every: int,
        meter: Meter,
        chart: Callable[[Mapping[str, float], int], None],
        *,
        writes: bool,
    ) -> None:
        """`chart` gets the numbers of a step that is said. `writes` is true on one rank; on others this does nothing."""
        self.path = folder / METRICS_NAME
        self.total_steps = total_steps
        self.log_every = log_every
        self._meter, self._chart = meter, chart
        self._first_step = last_step + 1
        self._started = time.monotonic()
        self._file: TextIO | None = None
        if writes:
            with storage_errors("write", self.path):
                kept = [line for line, record in _records(self.path) if record["step"] <= last_step]
                write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
                self._file = self.path.open("a", encoding="utf-8")

    def add(self, metrics: StepMetrics) -> None:
        """Write a step down, and say it if it is the first, the last or the `log_every`-th."""
        if self._file is None:
            return
        speed, rates = self._meter(metrics), self._meter.rates(metrics)
        self._write(self._file, {**asdict(metrics), "part_lr": rates, **speed})
        if metrics.step in (self._first_step, self.total_steps) or metrics.step % self.log_every == 0:
            log.info("%s", self._console(metrics, speed))
            with storage_errors("write", self.path.parent):
                own = {f"optimizer/lr/{part}": rate for part, rate in rates.items()}
                self._chart({**charted(metrics, speed), **own}, metrics.step)

    def add_validation(self, metrics: ValidationMetrics) -> None:
        """Write a validation down, and say it."""
        if self._file is None:
            return
        self._write(self._file, {"kind": VALIDATION, **asdict(metrics)})
        log.info("%s", describe_validation(metrics))

    def _write(self, file: TextIO, values: dict[str, Any]) -> None:
        values = {**values, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        with storage_errors("write", self.path):
            file.write(line_of(values) + "\n")
            file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _console(self, m: StepMetrics, speed: Mapping[str, float | None]) -> str:
        done = m.step - self._first_step + 1
        pace = (time.monotonic() - self._started) / done
        parts = [f"step {m.step}/{self.total_steps}", f"loss {m.loss:.4f}", f"text {m.text_loss:.4f}"]
        parts += [f"{name} {term.loss:.4f}" for name, term in m.objectives.items()]
        parts += [
            f"grad {m.grad_norm:.3f}",
            f"lr {m.lr:.2e}",
            f"{pace:.2f} s/step",
            f"{speed['tokens_per_second']:,.0f} tokens/s",
            *([f"MFU {speed['mfu']:.1%}"] if speed["mfu"] is not None else []),
            f"waiting for data {m.data_wait:.0%}",
            f"{m.memory / 2**30:.1f} GiB",
            f"left {_clock(pace * (self.total_steps - m.step))}",
        ]
        return "  ".join(parts)


def describe_validation(m: ValidationMetrics) -> str:
    """A validation as a line for people: losses, and the share of codes found at each depth."""
    parts = [f"validation after step {m.step}: loss {m.loss:.4f}", f"text {m.text_loss:.4f}"]
    for name, term in m.objectives.items():
        found = " ".join(f"{share:.3f}" for share in term.accuracy_depth)
        parts.append(f"{name} {term.loss:.4f}" + (f" (codes found by depth: {found})" if found else ""))
    return "  ".join([*parts, f"{m.samples} samples in {m.seconds:.1f} s"])


def last_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The last record of each kind in a phase's metrics, by what it is: `training`, `validation`."""
    return {record.get("kind", "training"): record for _, record in _records(folder / METRICS_NAME)}


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The complete lines of a log and what they say.

    A line that a killed process left unfinished does not count; a damaged one is named and left out, as nothing that is
    trained depends on it.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            if isinstance(record["step"], int):
                yield line, record
                continue
        except (ValueError, KeyError, TypeError):
            pass
        log.warning("line %d of %s is damaged and is left out", number, path)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
