"""The demo itself, on the published packages, with few images: every step runs, and a finished step is not run again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pipeline.demo

IMAGES, QUESTIONS = 60, 12


def demo(folder: Path) -> str:
    """Run the demo in `folder` and return what it printed."""
    command = [sys.executable, "-m", "pipeline", "demo", "--out", str(folder)]
    command += ["--images", str(IMAGES), "--questions", str(QUESTIONS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and mtime of every result of a step."""
    results = [*folder.glob("data/*"), *folder.glob("models/*/*"), *folder.glob("codebook/*")]
    results += [*folder.glob("tokens/shards/*"), *folder.glob("run/*/step_*/*"), folder / "tokens" / "manifest.json"]
    results += [*folder.glob("run/export/*"), folder / "answers.json"]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in results}


def test_a_small_demo(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    printed = demo(folder)
    assert "held-out accuracy" in printed
    assert "Next:" in printed
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["questions"] == QUESTIONS
    assert 0 <= summary["accuracy"] <= 1
    assert summary["same_answers_from_export"] == QUESTIONS
    page = (folder / "run" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    for part in ("Phase pretrain", "Phase instruct", "What codes mean", "Answers", "Throughput"):
        assert part in page
    report = subprocess.run(
        [sys.executable, "-m", "pipeline", "verify", str(folder / "tokens"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    counts = json.loads(report.stdout)
    assert (counts["images"], counts["ok"], counts["problems"]) == (IMAGES, IMAGES, [])

    # Again: nothing is made anew. Without the last step's result, that step alone.
    before = state(folder)
    demo(folder)
    assert state(folder) == before
    answers = folder / "answers.json"
    kept = answers.read_bytes()
    answers.unlink()
    demo(folder)
    assert answers.read_bytes() == kept
    del before[str(answers)]
    assert before.items() <= state(folder).items()


def test_the_question_script_needs_nothing_of_asvr(tmp_path: Path) -> None:
    script = shutil.copy(Path(pipeline.demo.__file__).with_name("ask.py"), tmp_path)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        check=False,
    )
    assert "ask.py run/export PICTURE" in done.stderr
    assert not any(name in done.stderr for name in ("| manifests", "train_stage", "tokenize_stage", "| pipeline"))
