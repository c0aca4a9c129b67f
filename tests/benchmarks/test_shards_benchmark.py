"""The shard benchmark runs and reads what it wrote; its rates are nobody's business here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_shards_benchmark_at_a_small_size() -> None:
    """Bytes per code are no timing: they hold at this size too."""
    flags = ["--rows=256", "--positions=256", "--depth=8", "--size=16384", "--reads=100"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.shards", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cells = {
        name.strip(): value.strip()
        for line in done.stdout.splitlines()
        if line.startswith("| ")
        for name, value in [line.strip("| ").split("|")[:2]]
    }
    assert float(cells["14 bits, packed"]) == 1.75
    assert 1.75 < float(cells["the shards, all columns"]) <= 1.9
