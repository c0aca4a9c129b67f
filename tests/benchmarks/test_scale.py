"""The page about scale is what its command prints, and follows from the measured figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scale import ASSUMED_RATE, CODES, duration, measured, size, tables

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_the_page_is_what_the_command_prints() -> None:
    """Regenerate the tables with: python -m benchmarks.scale"""
    assert tables(ASSUMED_RATE) in PAGE.read_text(encoding="utf-8")


def test_a_row_by_hand() -> None:
    known = measured()
    row = next(line for line in tables(100.0).splitlines() if line.startswith("| 10 million | 2,442"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == size(1e7 * 5832 * known.bytes_per_code)
    assert cells[4] == "117 GB"  # 10 million x 5,832 codes x 2 bytes
    assert CODES == 5832


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(1, "1 seconds"), (119, "119 seconds"), (120, "2.0 minutes"), (7200, "2.0 hours"), (3 * 86400, "3.0 days")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
