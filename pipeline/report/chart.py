"""Line charts as numbers for a template: paths, ticks and labels in a box of fixed units, and the same as a table.

Lines are told apart by their dashes and by names that stand at their ends, not by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 74, 12, 34
"""Margins, in which the numbers and the names of the lines stand."""

POINTS = 160
"""Most points of a line: more are averaged."""

TABLE_ROWS = 12
LABEL_STEP = 11.5
LABEL_LENGTH = 12


@dataclass(frozen=True)
class Series:
    """A named line. `markers`: few measured points, drawn as such."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    markers: bool = False


@dataclass(frozen=True)
class Line:
    """A series as drawn: its number (for dashes and colour), its path, marks, and where its name stands."""

    number: int
    name: str
    path: str
    dots: list[tuple[float, float]]
    label_y: float
    end_y: float

    @property
    def short(self) -> str:
        """The name as far as the margin has room for it; the table has all of it."""
        return self.name if len(self.name) <= LABEL_LENGTH else f"{self.name[: LABEL_LENGTH - 1]}\u2026"


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A drawn chart. `rows` have the x first, then a text for each line."""

    title: str
    summary: str
    x_name: str
    y_name: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    rows: list[list[str]]


def draw_chart(title: str, series: Sequence[Series], *, x_name: str, y_name: str, zero: bool = False) -> Chart | None:
    """Lay a chart out; None where no series has a finite point. `zero`: the axis of y begins at 0."""
    lines = [thinned(finite(one)) for one in series]
    lines = [one for one in lines if one.x]
    if not lines:
        return None
    x_low, x_high = _bounds([x for one in lines for x in one.x])
    y_low, y_high = _bounds([y for one in lines for y in one.y] + ([0.0] if zero else []))
    y_marks = round_numbers(y_low, y_high, 5)
    y_low, y_high = min(y_low, y_marks[0]), max(y_high, y_marks[-1])

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    ends = [down(one.y[-1]) for one in lines]
    labels = spread(ends, LABEL_STEP, TOP, HEIGHT - BOTTOM)
    drawn = []
    for number, (one, label) in enumerate(zip(lines, labels, strict=True)):
        points = [(across(x), down(y)) for x, y in zip(one.x, one.y, strict=True)]
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        dots = points if one.markers or len(points) == 1 else []
        drawn.append(Line(number, one.name, path, dots, round(label, 1), points[-1][1]))
    x_marks = [mark for mark in round_numbers(x_low, x_high, 8) if x_low <= mark <= x_high]
    return Chart(
        title,
        _summary(lines, x_name),
        x_name,
        y_name,
        drawn,
        [Tick(across(mark), number_text(mark)) for mark in x_marks],
        [Tick(down(mark), number_text(mark)) for mark in y_marks],
        _table(lines),
    )


def finite(one: Series) -> Series:
    """Without points that are no numbers."""
    kept = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return Series(one.name, [x for x, _ in kept], [y for _, y in kept], one.markers)


def thinned(one: Series) -> Series:
    """At most POINTS points, each the mean of as many steps as the others."""
    if len(one.x) <= POINTS:
        return one
    size = math.ceil(len(one.x) / POINTS)
    groups = [slice(start, start + size) for start in range(0, len(one.x), size)]
    mean = [[sum(values[g]) / len(values[g]) for g in groups] for values in (one.x, one.y)]
    return Series(one.name, mean[0], mean[1], one.markers)


def round_numbers(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that enclose low..high, evenly spaced by 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((power * factor for factor in (1, 2, 5) if power * factor >= rough * 0.999), power * 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def spread(wanted: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `step` apart as far as low..high has room."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    step = min(step, (high - low) / max(1, len(wanted) - 1)) if len(wanted) > 1 else step
    placed = [0.0] * len(wanted)
    floor = low
    for index in order:
        placed[index] = floor = max(wanted[index], floor)
        floor += step
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - step
    return placed


def number_text(value: float) -> str:
    """A short text: 12,000; 0.25; 1.2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        return f"{value:.3g}"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _summary(lines: Sequence[Series], x_name: str) -> str:
    """What a screen reader says of the picture."""
    said = [f"{one.name} from {number_text(one.y[0])} to {number_text(one.y[-1])}" for one in lines]
    return f"{'; '.join(said)}; {x_name} {number_text(lines[0].x[0])} to {number_text(lines[0].x[-1])}."


def _table(lines: Sequence[Series]) -> list[list[str]]:
    """Some x and what every line is there, or was just before."""
    every = sorted({x for one in lines for x in one.x})
    step = max(1, math.ceil(len(every) / TABLE_ROWS))
    chosen = every[::-1][::step][::-1]
    return [[number_text(x), *(_value_at(one, x) for one in lines)] for x in chosen]


def _value_at(one: Series, x: float) -> str:
    before = [y for at, y in zip(one.x, one.y, strict=True) if at <= x]
    return number_text(before[-1]) if before else "-"
