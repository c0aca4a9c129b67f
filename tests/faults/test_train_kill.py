"""A training run that is killed, wherever that hits it, ends as one that was not: with real ranks and real DeepSpeed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import tiny_models
import tiny_run

from train_stage import checkpoint as checkpoints
from train_stage.config import ModelConfig, TrainConfig

PHASES = ("pretrain", "instruct")


@dataclass(frozen=True)
class Reference:
    """A run on two ranks that nothing happened to."""

    folder: Path
    config: TrainConfig
    said: str


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASVR_CACHE", str(folder / "cache"))
        tiny_models.save_tower("siglip", folder / "tower")
        tiny_models.save_language_model(folder / "llama", tied=False)
        model = ModelConfig(language_model=str(folder / "llama"), vision_tower=str(folder / "tower"))
        config = tiny_run.make_config(folder, model)
        said = tiny_run.train(config, folder / "reference", ranks=2)
        yield Reference(folder, config, said)


def in_folder(reference: Reference, name: str) -> TrainConfig:
    return reference.config.model_copy(update={"output": str(reference.folder / name)})


def kill_when(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """SIGKILL all processes of a run, the ranks before their launcher, as soon as `happened`."""
    wait_until(process, happened)
    for rank in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    process.kill()
    process.communicate()


def wait_until(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def last_weights(config: TrainConfig, phase: str) -> bytes:
    newest = checkpoints.newest(config.phase_folder(phase))
    assert newest is not None
    assert newest.final
    return newest.weights.read_bytes()


def test_killed_in_a_save_and_between_saves_ends_as_if_it_was_not(reference: Reference) -> None:
    config = in_folder(reference, "killed")
    folder = config.phase_folder("pretrain")
    leftover, saving = folder / checkpoints.unfinished_name(1), folder / checkpoints.unfinished_name(2)
    leftover.mkdir(parents=True)
    process = tiny_run.start(config, reference.folder / "killed", ranks=2)
    wait_until(process, lambda: not leftover.exists())
    saving.mkdir()
    os.mkfifo(saving / checkpoints.WEIGHTS)  # nobody reads it, so the save stands still half-way
    kill_when(process, lambda: len(list((saving / "deepspeed").glob("*.pt"))) == 3)
    assert checkpoints.newest(folder) is None

    def instruct_is_at(step: int) -> bool:
        path = config.phase_folder("instruct") / "metrics.jsonl"
        return path.exists() and len(path.read_text().splitlines()) >= step

    kill_when(tiny_run.start(config, reference.folder / "killed", ranks=2), lambda: instruct_is_at(3))
    newest = checkpoints.newest(config.phase_folder("instruct"))
    assert newest is not None
    assert not newest.final

    tiny_run.train(config, reference.folder / "killed", ranks=2)
    for phase in PHASES:
        assert tiny_run.steps(config, phase) == tiny_run.steps(reference.config, phase), "to every printed digit"
        assert last_weights(config, phase) == last_weights(reference.config, phase)
    assert not list(folder.glob("*.tmp"))


def test_one_rank_and_two_ranks_give_the_same_losses(reference: Reference) -> None:
    config = in_folder(reference, "alone")
    tiny_run.train(config, reference.folder / "alone", ranks=1)
    for phase in PHASES:
        alone, together = tiny_run.steps(config, phase), tiny_run.steps(reference.config, phase)
        assert len(alone) == len(together) == {"pretrain": 3, "instruct": 6}[phase]
        for one, two in zip(alone, together, strict=True):
            for name in ("loss", "text_loss", "visual_loss", "visual_loss_depth"):
                assert one[name] == pytest.approx(two[name], abs=1e-6), (phase, one["step"], name)
            for name in ("epoch", "samples", "tokens", "text_tokens", "visual_positions", "lr"):
                assert one[name] == two[name]


def test_a_finished_run_does_nothing(reference: Reference) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(reference.config.output).rglob("*")}
    started = time.monotonic()
    said = tiny_run.train(reference.config, reference.folder / "reference")
    assert time.monotonic() - started < 5
    assert "every phase in" in said
    assert {path: path.stat().st_mtime_ns for path in Path(reference.config.output).rglob("*")} == before


def test_only_one_rank_reports_an_error(reference: Reference) -> None:
    config = in_folder(reference, "broken")
    values = config.model_dump(mode="json")
    values["phases"][0]["geometry"] = {"mode": "squash", "size": 28}
    broken = TrainConfig.model_validate(values)
    process = tiny_run.start(broken, reference.folder / "broken", ranks=2)
    _, said = process.communicate(timeout=240)
    assert process.returncode != 0
    assert said.count("error: phase pretrain asks for geometry") == 1
    assert "train_stage/" not in said.split("error: ")[1].split("\n")[0]


def test_what_is_said_is_ours(reference: Reference) -> None:
    """Neither DeepSpeed nor torch talks on the console of a run that goes well."""
    lines = [line for line in reference.said.splitlines() if line]
    assert all(line[2] == line[5] == ":" for line in lines), [line for line in lines if line[2:3] != ":"]
    assert any("steps of 5" in line for line in lines)
