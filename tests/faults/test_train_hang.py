"""A rank that hangs or dies ends the run within a minute, in one sentence, and nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_run
import torch.distributed as dist

from pipeline import launch, ranks
from train_stage import checkpoint as checkpoints
from train_stage.config import TrainConfig
from train_stage.ranks import is_lost_rank

TIMEOUT = 10
A_MINUTE = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("hang")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASVR_CACHE", str(folder / "cache"))
        yield tiny_run.make_config(folder, tiny_run.make_models(folder), timeout_seconds=TIMEOUT)


def rank_processes(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The ranks that `asvr train` has started."""
    started = psutil.Process(launcher.pid).children()
    return {int(own.environ()["RANK"]): own for own in started if "train_stage" in own.cmdline()}


def lose_rank(config: TrainConfig, folder: Path, hit: int, number: signal.Signals, *, after: int) -> str:
    """Start `asvr train`, signal a rank once so many steps of `pretrain` are done, and see all end; the sentence said."""
    launcher = tiny_run.start_command(config, folder)
    progress = config.phase_folder("pretrain") / "metrics.jsonl"
    while not (progress.exists() and len(progress.read_text().splitlines()) >= after):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.005)
    started = rank_processes(launcher)
    assert sorted(started) == [0, 1]
    began = time.monotonic()
    started[hit].send_signal(number)
    out, said = launcher.communicate(timeout=240)
    assert time.monotonic() - began < A_MINUTE
    assert launcher.returncode == 13, said
    assert "Traceback" not in out + said
    assert not [rank for rank in started.values() if rank.is_running()]
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert error.endswith(f"the same command resumes from {config.output}")
    return error


def test_a_rank_that_hangs_in_mid_training_is_named_and_ended(config: TrainConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"output": str(tmp_path / "run")})
    error = lose_rank(config, tmp_path, 0, signal.SIGSTOP, after=1)
    assert error.startswith("error: rank 0 did not answer the others for longer than timeout_seconds and was ended: ")


def test_a_run_goes_on_after_its_time_limit_and_a_rank_that_dies_in_it_is_named(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = config.model_copy(update={"output": str(tmp_path / "run"), "save_every": 1000})
    launcher = tiny_run.start_command(config, tmp_path, "--time-limit", "0.01")  # over before its first step is
    out, said = launcher.communicate(timeout=240)
    assert launcher.returncode == 12, said
    assert "the time limit of 0.01 minutes is reached" in said
    assert "Traceback" not in out + said
    saved = checkpoints.newest(config.phase_folder("pretrain"))
    assert saved is not None
    assert (saved.step, saved.final, saved.world) == (1, False, 2)

    error = lose_rank(config, tmp_path, 1, signal.SIGKILL, after=2)
    assert error.startswith("error: rank 1 was ended by SIGKILL")
    steps = [own["step"] for own in tiny_run.steps(config, "pretrain")]
    assert steps == [1, 2, 3][: len(steps)]


STOPPED_IN_DEEPSPEED = """
import os, signal, sys
from train_stage import engine
from train_stage.__main__ import main
step = engine.Engine.step
def stop_and_step(self, rate):
    if self.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return step(self, rate)
engine.Engine.step = stop_and_step
sys.exit(main(sys.argv[1:]))
"""


def test_deepspeed_waits_no_longer_for_a_rank_than_we_do(
    config: TrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's own group has its own timeout. A rank whose launcher is not ours says itself what happened."""
    monkeypatch.setattr(ranks, "LEFT_BEHIND_SECONDS", 3.0)
    config = config.model_copy(update={"output": str(tmp_path / "run")})
    path = launch.write_config(config)
    began = time.monotonic()
    command = [sys.executable, "-c", STOPPED_IN_DEEPSPEED, str(path)]
    with pytest.raises(ranks.RankError) as caught:
        ranks.run_ranks(command, 2, os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny_run.REPOSITORY)})
    assert time.monotonic() - began < 2 * A_MINUTE, "with the start of the run"
    assert (caught.value.rank, caught.value.code) == (1, None)
    said = capfd.readouterr().err
    assert f"error: rank 0 waited {TIMEOUT} s (timeout_seconds) for another rank, which hangs or was ended" in said
    assert "Traceback" not in said


def test_a_rank_that_never_comes_is_missed(tmp_path: Path) -> None:
    source = "from train_stage.ranks import *\nwith lost_ranks_named(2, 'RUN'): join_ranks(2)"
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks._free_port())}
    found = subprocess.run(
        [sys.executable, "-c", source], cwd=tiny_run.REPOSITORY, env=os.environ | place, capture_output=True, text=True
    )
    assert "manifests.errors.RankLost: rank 0 waited 2 s (timeout_seconds) for another rank" in found.stderr


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:5] Connection closed by peer [127.0.0.1]:7361"), True),
        (RuntimeError("[enforce fail at /gloo/transport/tcp/pair.cc:4] op.nbytes == length. 16 vs 8"), False),
        (dist.DistBackendError("NCCL error: ncclRemoteError: A call failed, a remote process exited"), True),
        (dist.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
    ],
)
def test_only_the_loss_of_a_rank_is_taken_for_one(error: RuntimeError, lost: bool) -> None:
    assert is_lost_rank(error) is lost


@pytest.mark.parametrize(
    ("first", "later", "blamed"),
    [
        ([None, -9], [13, -9], (1, -9)),
        ([None, 13], [-9, 13], (0, -9)),
        ([None, 4], [-6, 4], (1, 4)),
        ([None, 1], [13, 1], (1, 1)),
        ([None, 4], [4, 4], (0, 4)),
        ([13, None, 13], [13, None, 13], (1, None)),
        ([13, None], [13, 13], (0, 13)),
    ],
)
def test_the_rank_that_ended_the_run_is_found(first: list, later: list, blamed: tuple) -> None:
    error = ranks._blame(first, later)
    assert (error.rank, error.code) == blamed
