"""The decode benchmark runs; its rates are nobody's business here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mode", ["pad", "anyres"])
def test_the_decode_benchmark_at_a_tiny_size(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.decode", f"--images={tmp_path}", f"--mode={mode}", "--size=14"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "5 images below" in done.stdout
    assert f"{mode} to 14, {'1.0' if mode == 'pad' else '5.0'} views an image" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("| 2 | ")
