"""SIGKILL of the driver at random moments: a rerun ends in exactly what an undisturbed run makes, nothing done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from made_jobs import content, job_config, make_pictures, make_tokenizer, start_driver

from manifests.verify import status, verify
from tokenize_stage.config import TokenSetConfig
from tokenize_stage.job import run_job

KILLS = int(os.environ.get("ASVR_SOAK_KILLS", "3"))
UNITS = 20 * KILLS
"""Enough that no kill finds the job finished: one comes after at most ten units more, and a few are in flight."""


def records(output: Path) -> dict[str, int]:
    """The commit records and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "commits").glob("*.zst")}


def kill_after(config: TokenSetConfig, units: int, pause: float) -> None:
    """Start a driver and kill it, with all it started, once it has committed so many units more."""
    driver = start_driver(config, start_new_session=True)
    already = len(records(config.output))
    while len(records(config.output)) < already + units:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.001)
    time.sleep(pause)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()


@pytest.mark.timeout(300 + 60 * KILLS)
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_kills_at_random_moments(tmp_path: Path, engine: str) -> None:
    codebook = make_tokenizer(tmp_path / "tokenizer")
    pictures = make_pictures(tmp_path / "pictures", 3 * UNITS)
    clean = job_config(pictures, codebook, tmp_path / "clean", unit_size=3, batch_size=2)
    run_job(clean)
    ray = clean.ray.model_copy(update={"address": "local"})
    config = clean.model_copy(update={"output": tmp_path / "out", "engine": engine, "ray": ray})
    generator = random.Random(time.time_ns())
    kept: dict[str, int] = {}
    for _ in range(KILLS):
        kill_after(config, generator.randrange(1, 11), generator.random() * 0.02)
        now = records(config.output)
        assert kept.items() <= now.items()  # no committed unit was committed again
        kept = now
        assert status(config.output).state == "interrupted"
    result = run_job(config)
    assert result.encoded == 3 * (UNITS - len(kept))
    assert kept.items() <= records(config.output).items()
    assert content(config.output) == content(clean.output)
    assert verify(config.output).problems == []
    lines = [json.loads(line)["unit"] for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    # A kill between a unit's commit and its line may lose the line; no unit can have two.
    assert len(lines) == len(set(lines)) >= UNITS - KILLS
