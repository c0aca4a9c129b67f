"""A training run that is killed, wherever that hits it, ends as one that was not: with real ranks and real DeepSpeed."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import tiny_run

from train_stage import checkpoint as checkpoints
from train_stage.config import TrainConfig

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
        config = tiny_run.make_config(folder, tiny_run.make_models(folder))
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


def test_what_is_told_to_end_saves_what_it_did(reference: Reference) -> None:
    config = in_folder(reference, "told").model_copy(update={"save_every": 1000})
    progress = config.phase_folder("pretrain") / "metrics.jsonl"
    process = tiny_run.start_command(config, reference.folder / "told")
    wait_until(process, lambda: progress.exists() and bool(progress.read_text()))
    process.terminate()
    _, said = process.communicate(timeout=240)
    assert process.returncode == 143, said
    phase = "instruct" if config.phase_folder("instruct").exists() else "pretrain"
    newest = checkpoints.newest(config.phase_folder(phase))
    assert newest is not None
    assert newest.step == len(tiny_run.steps(config, phase)) < 6

    process = tiny_run.start_command(config, reference.folder / "told", "--max-steps", "1")
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "1 steps were asked for" in said
    tiny_run.train(config, reference.folder / "told", ranks=2)
    for phase in PHASES:
        assert tiny_run.steps(config, phase) == tiny_run.steps(reference.config, phase)
        assert last_weights(config, phase) == last_weights(reference.config, phase)


def test_kills_at_random_moments_leave_the_same_bits(reference: Reference) -> None:
    kills = int(os.environ.get("ASVR_SOAK_TRAIN_KILLS", "5"))
    values = reference.config.model_dump(mode="json") | {"save_every": 1}
    values["phases"] = [values["phases"][1] | {"epochs": 2 * kills, "max_steps": 6 * kills}]
    long = TrainConfig.model_validate(values)
    undisturbed = long.model_copy(update={"output": str(reference.folder / "undisturbed")})
    tiny_run.train(undisturbed, reference.folder / "undisturbed", ranks=2)
    config = long.model_copy(update={"output": str(reference.folder / "random")})
    folder, chance, done = config.phase_folder("instruct"), random.Random(0), 0

    def steps_are_beyond(step: int) -> bool:
        newest = checkpoints.newest(folder)
        return newest is not None and newest.step > step

    for _ in range(kills):
        process = tiny_run.start_command(config, reference.folder / "random")
        wait_until(process, lambda: steps_are_beyond(done))  # noqa: B023 - called before the next turn
        time.sleep(chance.uniform(0, 0.3))
        kill_when(process, lambda: True)
        newest = checkpoints.newest(folder)
        assert newest is not None
        assert newest.step > done
        done = newest.step
    assert done < 6 * kills, "the kills came while there was something left to do"
    tiny_run.train(config, reference.folder / "random", ranks=2)
    assert tiny_run.steps(config, "instruct") == tiny_run.steps(undisturbed, "instruct")
    assert last_weights(config, "instruct") == last_weights(undisturbed, "instruct")


def test_one_rank_and_two_ranks_give_the_same_losses(reference: Reference) -> None:
    config = in_folder(reference, "alone")
    tiny_run.train(config, reference.folder / "alone", ranks=1)
    for phase in PHASES:
        alone, together = tiny_run.steps(config, phase), tiny_run.steps(reference.config, phase)
        assert len(alone) == len(together) == {"pretrain": 3, "instruct": 6}[phase]
        for one, two in zip(alone, together, strict=True):
            for name in ("loss", "text_loss", "visual_loss", "objectives.codes.loss_depth"):
                assert one[name] == pytest.approx(two[name], abs=1e-6), (phase, one["step"], name)
            for name in ("epoch", "samples", "tokens", "text_tokens", "objectives.codes.targets", "lr"):
                assert one[name] == two[name]


def test_another_number_of_ranks_goes_on_with_the_same_numbers(reference: Reference) -> None:
    config = in_folder(reference, "elastic")
    folder = config.phase_folder("instruct")
    for ranks, step in ((2, 2), (1, 4)):
        reached = folder / f"step_{step}"
        kill_when(tiny_run.start(config, reference.folder / "elastic", ranks=ranks), reached.is_dir)
    tiny_run.train(config, reference.folder / "elastic", ranks=2)
    for step, undisturbed in zip(
        tiny_run.steps(config, "instruct"), tiny_run.steps(reference.config, "instruct"), strict=True
    ):
        for name, value in undisturbed.items():
            assert step[name] == pytest.approx(value, abs=1e-6), (undisturbed["step"], name)


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
