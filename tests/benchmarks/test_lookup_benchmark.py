"""The benchmark of a run's lookup runs, and reads what it says it reads; how fast is nobody's business here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_lookup_benchmark_at_a_small_size() -> None:
    command = [sys.executable, "-m", "benchmarks.lookup", "--images", "9000", "3000", "--needed", "5000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    large, small = (line.split() for line in done.stdout.splitlines()[-2:])
    assert large[:2] == ["9,000", "5,000"]
    assert small[:2] == ["3,000", "3,000"]
    assert all(float(value.replace(",", "")) >= 0 for value in (*large[2:], *small[2:]))
