"""What the benchmark of `asvr plan` makes is what it says: a recipe of which everything is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan_recipe import make
from pipeline.recipe import load_recipe
from pipeline.state import plan


def test_everything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenize_stage.inventory_cache.ALWAYS_LISTED", 100)  # so that few images count as many
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    make(tmp_path, 10_000)
    steps = plan(load_recipe(tmp_path / "recipe.yaml"))
    assert [step.state for step in steps] == ["fresh"] * 4
    assert steps[0].why.startswith("10,000 images; inventory of 2026-01-01")
