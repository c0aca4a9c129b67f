"""The tokenize benchmark runs, and all contestants do the same work; their rates are nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
IMAGES, POSITIONS, DEPTH = 24, 4, 2
TINY = {
    "images": IMAGES, "seconds": 1, "threads": 2, "batch-size": 4, "unit-size": 8, "view-size": 28, "width": 64,
    "layer": 1, "size": 16, "depth": DEPTH, "device": "cpu",
}  # fmt: skip


def test_the_tokenize_benchmark_at_a_tiny_size(tmp_path: Path) -> None:
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    flags += ["--engine=ray", f"--work={tmp_path}", f"--json={tmp_path / 'out.json'}"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tokenize", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    contestants = {"job", "plain", "ray_script"}
    assert set(found["results"]) == contestants | {"decode_limit", "encode_limit"}
    for name in contestants:
        result = found["results"][name]
        assert result["all"] == IMAGES
        assert result["codes"] == IMAGES * POSITIONS * DEPTH
        assert 0 < result["images"] < IMAGES
        assert result["peak"] > 100 * 2**20
    assert found["quarter"]["all"] == IMAGES // 4
    assert found["results"]["job"]["digest"] == found["results"]["plain"]["digest"]
    assert "| this job |" in done.stdout
    assert "are the same." in done.stdout
    _look_like_photographs(tmp_path / "all")


def _look_like_photographs(folder: Path) -> None:
    """Sizes are mixed; neighbouring pixels are alike and distant ones are not."""
    pictures = [Image.open(file) for file in sorted(folder.rglob("*.jpg"))]
    assert len(pictures) == IMAGES
    assert len({picture.size for picture in pictures}) == 8
    grey = np.asarray(pictures[0].convert("L"), float)
    near, far = (np.abs(grey[:, :-by] - grey[:, by:]).mean() for by in (1, 100))
    assert 3 * near < far
