"""The training benchmark runs, and its contestants do the same work; their times are nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_training_benchmark_at_a_tiny_size(tmp_path: Path) -> None:
    flags = [
        "--shape=tiny",
        "--steps=2",
        "--device=cpu",
        "--threads=1",
        "--row-tokens=64",
        f"--json={tmp_path / 'out'}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out").read_text())["results"]
    text, asvr, reference = (found[name] for name in ("text", "asvr", "reference"))
    assert text["text_loss"] == pytest.approx(asvr["text_loss"], rel=1e-5)
    assert reference["text_loss"] == pytest.approx(asvr["text_loss"], rel=1e-5)
    assert reference["visual_loss"] == pytest.approx(asvr["visual_loss"], rel=1e-5)
    assert text["visual_loss"] is None
    assert asvr["flops"] == reference["flops"] == text["flops"] + asvr["head_flops"]
    assert (text["padding"], asvr["padding"]) == (0, 0)
    assert reference["padding"] > 0
    assert text["mfu"] is None
    assert "| (b) this project |" in done.stdout
    assert "Time of (b) beyond the head's own FLOPs" in done.stdout
