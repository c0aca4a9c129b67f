"""The curves of a report: losses and code accuracy of a training run, throughput of a tokenize job."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifests.storage import Store
from pipeline.report.chart import Chart, Series, draw_chart
from pipeline.report.runs import Phase, Run

JOB_METRICS = "metrics.jsonl"
BINS = 60


def phase_charts(phase: Phase) -> list[Chart]:
    """The losses of a phase, then those of each objective by depth, and how often it predicts the code."""
    steps = phase.steps
    losses = [_series("all", steps, "loss"), _series("text", steps, "text_loss")]
    losses += [_series(name, steps, "objectives", name, "loss") for name in _objectives([phase])]
    losses += _validation(phase, "text val.", "text_loss")
    losses += [
        line for name in _objectives([phase]) for line in _validation(phase, f"{name} val.", "objectives", name, "loss")
    ]
    drawn = [draw_chart("Loss", losses, x_name="step", y_name="loss")]
    for name in _objectives([phase]):
        for key, title in (("loss_depth", "loss by depth"), ("accuracy_depth", "code accuracy by depth")):
            lines = _by_depth(steps, name, key)
            if len(lines) > 1 or key == "accuracy_depth":
                lines += _by_depth(phase.validations, name, key, mark=" val.")
                drawn.append(draw_chart(f"{name}: {title}", lines, x_name="step", y_name=title.split(" by ")[0]))
    return [chart for chart in drawn if chart]


def comparison_charts(first: Run, second: Run) -> list[tuple[str, list[Chart]]]:
    """For each phase that two runs both have: their text losses, and of each objective that both have loss and accuracy."""
    found = []
    theirs = {phase.name: phase for phase in second.phases}
    names = (first.name, second.name) if first.name != second.name else ("first", "second")
    for phase in first.phases:
        if phase.name not in theirs:
            continue
        pair = list(zip(names, (phase, theirs[phase.name]), strict=True))
        lines = [_series(name, one.steps, "text_loss") for name, one in pair]
        lines += [line for name, one in pair for line in _validation(one, f"{name} val.", "text_loss")]
        drawn = [draw_chart("Text loss", lines, x_name="step", y_name="loss")]
        for objective in _objectives([phase, theirs[phase.name]]):
            lines = [_series(name, one.steps, "objectives", objective, "loss") for name, one in pair]
            for name, one in pair:
                lines += _validation(one, f"{name} val.", "objectives", objective, "loss")
            drawn.append(draw_chart(f"{objective}: loss", lines, x_name="step", y_name="loss"))
            lines = [_mean_accuracy(name, one.steps, objective) for name, one in pair]
            drawn.append(draw_chart(f"{objective}: code accuracy", lines, x_name="step", y_name="accuracy"))
        charts = [chart for chart in drawn if chart]
        if charts:
            found.append((phase.name, charts))
    return found


def _objectives(phases: Sequence[Phase]) -> list[str]:
    names = [name for phase in phases for step in phase.steps for name in _dict(step.get("objectives"))]
    return list(dict.fromkeys(names))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")


def _series(name: str, steps: Iterable[dict[str, Any]], *keys: str, markers: bool = False) -> Series:
    points = []
    for step in steps:
        value: Any = step
        for key in keys:
            value = _dict(value).get(key)
        points.append((_number(step.get("step")), _number(value)))
    return Series(name, [x for x, _ in points], [y for _, y in points], markers)


def _validation(phase: Phase, name: str, *keys: str) -> list[Series]:
    return [_series(name, phase.validations, *keys, markers=True)] if phase.validations else []


def _by_depth(steps: Sequence[dict[str, Any]], objective: str, key: str, mark: str = "") -> list[Series]:
    rows = []
    for step in steps:
        values = _dict(_dict(step.get("objectives")).get(objective)).get(key)
        if isinstance(values, list) and values:
            rows.append((_number(step.get("step")), values))
    depths = max((len(values) for _, values in rows), default=0)
    return [
        Series(
            f"depth {depth}{mark}",
            [x for x, values in rows if depth < len(values)],
            [_number(values[depth]) for _, values in rows if depth < len(values)],
            bool(mark),
        )
        for depth in range(depths)
    ]


def _mean_accuracy(name: str, steps: Sequence[dict[str, Any]], objective: str) -> Series:
    depths = _by_depth(steps, objective, "accuracy_depth")
    if not depths:
        return Series(name, [], [])
    whole = [one for one in depths if len(one.x) == len(depths[0].x)]
    return Series(name, depths[0].x, np.mean([one.y for one in whole], axis=0).tolist())


@dataclass(frozen=True)
class Throughput:
    """How fast a tokenize job went. `working` seconds are those in which some worker was at a unit; pauses are cut out."""

    charts: list[Chart]
    units: int
    images: int
    working: float
    pauses: int


def job_throughput(store: Store) -> Throughput | None:
    """From the lines that the job wrote for each unit; None where there are none."""
    if not store.exists(JOB_METRICS):
        return None
    rows = []
    for line in store.read(JOB_METRICS).decode(errors="replace").split("\n")[:-1]:
        try:
            row = json.loads(line)
            end = datetime.fromisoformat(row["time"]).timestamp()
            rows.append((end, max(float(row["seconds"]), 1e-3), int(row["images"]), float(row["wait_share"])))
        except (ValueError, KeyError, TypeError):  # a crash may cut lines of this log, which nothing depends on
            continue
    if not rows:
        return None
    ends, seconds, images, waits = np.array(rows, float).T
    starts = ends - seconds
    covered, pauses = _covered(starts, ends)
    low, high = _on(covered, starts), _on(covered, ends)
    working = float(high.max())
    edges = np.linspace(0, working, min(BINS, max(8, len(rows))) + 1)
    share_BN = np.clip(np.minimum(high, edges[1:, None]) - np.maximum(low, edges[:-1, None]), 0, None) / seconds
    middle = ((edges[1:] + edges[:-1]) / 2).tolist()
    rate = (share_BN @ images) / np.diff(edges)
    busy = share_BN @ seconds
    waiting = (share_BN @ (waits * seconds)) / np.where(busy > 0, busy, np.nan)
    charts = [
        draw_chart("Images per second", [Series("images/s", middle, rate.tolist())], x_name="seconds of work", y_name="images/s", zero=True),
        draw_chart("Share of time waiting for images", [Series("waiting", middle, waiting.tolist())], x_name="seconds of work", y_name="share", zero=True),
    ]  # fmt: skip
    return Throughput([chart for chart in charts if chart], len(rows), int(images.sum()), working, pauses)


def _covered(starts: NDArray[np.float64], ends: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """The stretches (n, 3) of time in which any unit was in work: begin, end, work done before; and the pauses between."""
    stretches: list[list[float]] = []
    for index in np.argsort(starts):
        if stretches and starts[index] <= stretches[-1][1] + 1:  # a second between two units is no pause
            stretches[-1][1] = max(stretches[-1][1], ends[index])
        else:
            stretches.append([starts[index], ends[index]])
    table = np.array(stretches)
    before = np.concatenate([[0], np.cumsum(table[:, 1] - table[:, 0])[:-1]])
    return np.column_stack([table, before]), len(stretches) - 1


def _on(covered: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Clock times as seconds of work."""
    at = np.searchsorted(covered[:, 0], times, side="right") - 1
    inside: NDArray[np.float64] = covered[at, 2] + np.minimum(times, covered[at, 1]) - covered[at, 0]
    return inside
