"""A run that goes on does so with what it began with, or says what has become another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import tiny_set
import torch

from manifests.errors import AsvrError, InputError, TrainingStopped
from pipeline.launch import write_config
from train_stage import checkpoint as checkpoints
from train_stage import run as runs
from train_stage.__main__ import read_config
from train_stage.config import ModelConfig, ResolvedPhase, TrainConfig
from train_stage.phase_data import Ahead, load_ahead
from train_stage.ranks import Ranks
from train_stage.run import run_phase
from train_stage.stopping import Stop, Stopper


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


def run_with(
    between: Callable[[], object], config: TrainConfig, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """So many steps of a run of two phases; `between` happens before the second one."""

    def phase_by_phase(config: TrainConfig, phase: ResolvedPhase, *more: Any) -> Stop | None:
        if phase.name == "instruct":
            between()
        return run_phase(config, phase, *more)

    monkeypatch.setattr(runs, "run_phase", phase_by_phase)
    monkeypatch.setattr(runs, "join_ranks", lambda _timeout: ranks)
    monkeypatch.setattr(runs, "leave_ranks", lambda: None)
    assert runs.run(config, lambda _error: None, Stopper(max_steps=steps)) is not None


def test_a_manifest_that_is_replaced_between_phases_is_not_what_the_second_was_trained_on(
    tmp_path: Path, tiny_model: Callable[[], ModelConfig], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run reads all of its data when it starts."""
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    made = tiny_run.make_config(tmp_path, tiny_model())
    ids = sorted(path.name for path in (tmp_path / "images").iterdir())
    tiny_set.save_manifest(tmp_path / "other", tmp_path / "images", ids)
    second = made.phases[1].model_copy(update={"manifests": (str(tmp_path / "other"),)})
    config = made.model_copy(update={"phases": (made.phases[0], second)})

    def replace() -> None:
        """As `asvr tokenize --replace`: what the old manifest names stays beside the new one."""
        tiny_set.save_manifest(tmp_path / "new", tmp_path / "images", ids, code_seed=9)
        shutil.copytree(tmp_path / "new", tmp_path / "other", dirs_exist_ok=True)

    run_with(replace, config, ranks, monkeypatch, steps=5)
    error = load_ahead(config).error
    assert isinstance(error, TrainingStopped)
    assert "manifests: other codes or features" in str(error)


def test_a_model_that_is_replaced_between_phases_ends_the_run(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each phase reads it anew: the second would train another language model and say that it was the first."""
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    config = tiny_run.make_config(tmp_path, tiny_run.make_models(tmp_path))
    with pytest.raises(TrainingStopped, match=r"the model is another .*\(model\.language_model: "):
        run_with(lambda: (tmp_path / "llama" / "more.json").write_text("{}"), config, ranks, monkeypatch, steps=5)


def test_the_folder_s_configuration_is_that_of_the_run_that_has_the_lease(
    tmp_path: Path, tiny_model: Callable[[], ModelConfig], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second call, refused when it asks for the lease, has written its own while the first one read its data."""
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    config = tiny_run.make_config(tmp_path, tiny_model())
    other = config.model_copy(update={"seed": 7})

    def meanwhile(config: TrainConfig) -> Ahead:
        ahead = load_ahead(config)
        write_config(other)
        return ahead

    monkeypatch.setattr(runs, "load_ahead", meanwhile)
    run_with(lambda: None, config, ranks, monkeypatch, steps=1)
    assert read_config(Path(config.output) / "config.json") == config


class Second(Ranks):
    """The second of two ranks, of which the first is on another machine."""

    def gather(self, items: list[str]) -> list[str]:
        return ["first", *items]

    def share_error(self, error: AsvrError | None) -> None:
        if error is not None:
            raise error


def test_ranks_that_write_to_different_folders_of_one_name_do_not_begin(tmp_path: Path, ranks: Ranks) -> None:
    """Each would keep its part of a checkpoint to itself, and none of them could be gone on from."""
    second = Second(1, 2, torch.device("cpu"))
    with pytest.raises(InputError, match=r"rank 1, on .*, does not see what rank 0 writes to .*one folder for all"):
        runs.check_same_output(str(tmp_path), second, patience=0.0)
    (tmp_path / ".asvr-first").touch()
    runs.check_same_output(str(tmp_path), second, patience=0.0)
    assert [path.name for path in tmp_path.iterdir()] == [".asvr-first"], "the first rank's to remove"
    (tmp_path / ".asvr-first").unlink()
    runs.check_same_output(str(tmp_path), ranks)
    assert not list(tmp_path.iterdir())
