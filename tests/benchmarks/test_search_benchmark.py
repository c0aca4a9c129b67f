"""The benchmarks run and count no differing code of ours; their rates are nobody's business here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def test_the_search_benchmark_at_a_tiny_size(tmp_path: Path) -> None:
    features = tmp_path / "features.npy"
    np.save(features, np.random.default_rng(0).standard_normal((40, 16, 24), dtype=np.float32))
    sizes = {"positions": 60, "width": 40, "size": 128, "depth": 2, "repeats": 1, "checked": 60, "real-size": 32}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.search", "--device=cpu", "--threads=1", f"--features={features}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stdout.splitlines() if line.startswith("| ours ")]
    assert len(ours) == 2
    assert all(line.endswith("| 0 (0.0%) |") for line in ours)
    assert done.stdout.count("| Float16Pass: mean, 99th percentile |") == 2
