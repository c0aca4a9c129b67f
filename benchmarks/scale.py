"""What a token set of so many images costs: arithmetic from measured rates, and from what is not known here as an option.

    python -m benchmarks.scale [--rate IMAGES_A_SECOND_A_GPU]

The rates are read from `docs/benchmarks.md`, so the tables of `docs/scale.md` follow from its figures; a test compares them.
Linear where nothing was measured at that size, which the page says beside the table.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[1] / "docs"
SIZES = {"558 thousand": 558_000, "10 million": 10**7, "100 million": 10**8, "1 billion": 10**9, "10 billion": 10**10}
CODES = 729 * 8
"""Of an image: 27 x 27 positions, 8 depths, the paper's shape."""
CODE_BYTES = 2
UNIT_IMAGES = 4096
GPUS = (1, 8, 64, 1024)
ASSUMED_RATE = 200.0
"""Images a second of one GPU. An assumption, not a measurement: `asvr tokenize --limit 2000` measures yours."""


class Measured(NamedTuple):
    """Figures of `docs/benchmarks.md`."""

    bytes_per_code: float
    index_bytes: float
    copied_rows: float
    decoded_images: float
    """A second, on the 2 cores of that machine."""


def measured() -> Measured:
    """The figures as the page has them; ValueError when a row is not there."""
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")

    def figure(pattern: str) -> float:
        found = re.search(pattern, text)
        if found is None:
            raise ValueError(f"docs/benchmarks.md has no row like {pattern}")
        return float(found[1].replace(",", ""))

    return Measured(
        figure(r"\| the shards, all columns \| ([\d.]+) \|"),
        figure(r"\| the index \| [\d.]+ \((\d+) bytes an image\) \|"),
        figure(r"\| copying the shards to the table of a training node, once \| ([\d,]+) \|"),
        figure(r"\| \(c\) decoding alone \| ([\d.,]+) \|"),
    )


def tables(rate: float) -> str:
    """The two tables of `docs/scale.md`, in Markdown."""
    known = measured()
    lines = [
        "| images | shards | codes on disk | index | table of a training node | filling it |",
        "|---|---|---|---|---|---|",
    ]
    for name, images in SIZES.items():
        shards = -(-images // UNIT_IMAGES)
        cells = (
            f"{shards:,}",
            size(images * CODES * known.bytes_per_code),
            size(images * known.index_bytes),
            size(images * CODES * CODE_BYTES),
            duration(images / known.copied_rows),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| at {rate:,.0f} images/s a GPU | {' | '.join(f'{gpus:,} GPU' + 's' * (gpus > 1) for gpus in GPUS)} |",
        f"|---{'|---' * len(GPUS)}|",
    ]
    for name, images in SIZES.items():
        lines.append(f"| {name} | {' | '.join(duration(images / (rate * gpus)) for gpus in GPUS)} |")
    cores = 2 * rate / known.decoded_images
    lines += ["", f"Decoding for one such GPU keeps {cores:.1f} cores busy."]
    return "\n".join(lines)


def size(count: float) -> str:
    """Decimal units, three digits."""
    units = ("B", "kB", "MB", "GB", "TB")
    step = min(max(int(math.log10(max(count, 1)) // 3), 0), len(units) - 1)
    scaled = count / 1000**step
    return f"{scaled:.3g} {units[step]}" if scaled < 1000 else f"{scaled:,.0f} {units[step]}"


def duration(seconds: float) -> str:
    """In the largest unit of which there are at least two."""
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=ASSUMED_RATE, help="images a second of one GPU")
    print(tables(parser.parse_args().rate))
