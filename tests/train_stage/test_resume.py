"""A run that goes on does so with what it began with, or says what has become another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run

from manifests.errors import TrainingStopped
from train_stage import checkpoint as checkpoints
from train_stage.config import TrainConfig
from train_stage.ranks import Ranks
from train_stage.run import run_phase
from train_stage.stopping import Stopper


@pytest.fixture
def config(tmp_path: Path, tiny_model, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """One phase of 3 steps, which trains on whatever samples it can use."""
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    made = tiny_run.make_config(tmp_path, tiny_model())
    return made.model_copy(update={"phases": (made.phases[0].model_copy(update={"max_bad_rate": 0.5}),)})


def test_another_choice_of_usable_samples_is_refused(config: TrainConfig, ranks: Ranks, tmp_path: Path) -> None:
    """One picture less is another permutation: some samples would be seen twice, others not at all."""
    phase = config.phase("pretrain")
    assert run_phase(config, phase, ranks, None, Stopper(max_steps=1)) is not None
    picture = min((tmp_path / "images").iterdir())
    picture.rename(tmp_path / "away.png")
    with pytest.raises(TrainingStopped, match=r"step_1 was made with 14 samples, .* now \(13\) are others"):
        run_phase(config, phase, ranks, None, Stopper(max_steps=1))
    (tmp_path / "away.png").rename(picture)
    (tmp_path / "captions.json").rename(tmp_path / "moved.json")
    data = phase.data[0].model_copy(update={"path": str(tmp_path / "moved.json")})
    moved = config.model_copy(update={"phases": (config.phases[0].model_copy(update={"data": (data,)}),)})
    assert run_phase(moved, moved.phase("pretrain"), ranks, None, Stopper()) is None
    newest = checkpoints.newest(config.phase_folder("pretrain"))
    assert newest is not None
    assert newest.final


def test_a_checkpoint_that_does_not_know_its_samples_is_taken(config: TrainConfig, ranks: Ranks) -> None:
    phase = config.phase("pretrain")
    run_phase(config, phase, ranks, None, Stopper(max_steps=1))
    marker = config.phase_folder("pretrain") / "step_1" / checkpoints.MARKER
    known = json.loads(marker.read_text())
    del known["samples"]
    marker.write_text(json.dumps(known))
    assert run_phase(config, phase, ranks, None, Stopper()) is None
