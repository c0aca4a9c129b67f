"""The commands that other programs are given are read by their own parsers, and mean what was asked for."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from manifests.errors import EnvironmentProblem, RecipeError
from pipeline import launch, submit
from pipeline.cli import run
from pipeline.launchers import Launcher, find_program
from pipeline.token_sets import Choice

RANK = ["train", "/shared/my recipe.yaml", "--set", "train.seed=3", "--phase", "pretrain"]
RANK += ["--max-steps", "7", "--time-limit", "1.5"]


def rank_arguments() -> list[str]:
    limits = launch.Limits(max_steps=7, minutes=1.5)
    return launch.arguments(Path("/shared/my recipe.yaml"), ["train.seed=3"], "pretrain", limits)


def test_a_rank_is_told_what_the_launcher_was_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert rank_arguments() == RANK
    monkeypatch.chdir(tmp_path)
    assert launch.arguments(Path("r.yaml")) == ["train", str(tmp_path / "r.yaml")]


@pytest.mark.parametrize(
    ("launcher", "gpus", "nodes", "ranks", "backend"),
    [
        (Launcher("torchrun"), 4, "1:1", "4", "static"),
        (Launcher("torchrun"), 0, "1:1", "1", "static"),
        (Launcher("torchrun", nproc=2), 4, "1:1", "2", "static"),
        (Launcher("torchrun", nodes=3, rendezvous="head:29500"), 8, "3", "8", "c10d"),
    ],
)
def test_torchrun_understands_its_command(launcher: Launcher, gpus: int, nodes: str, ranks: str, backend: str) -> None:
    from torch.distributed.run import get_args_parser

    program, *rest = launcher.command(rank_arguments(), gpus=gpus, environment={})
    read = get_args_parser().parse_args(rest)
    assert program == "torchrun"
    assert (read.nnodes, read.nproc_per_node, read.rdzv_backend) == (nodes, ranks, backend)
    assert read.standalone == (launcher.rendezvous is None)
    assert read.rdzv_endpoint == (launcher.rendezvous or "")
    assert (read.module, read.training_script, read.training_script_args) == (True, "pipeline", RANK)


def test_deepspeed_understands_its_command(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=8\nnode2 slots=8\n")
    program, *rest = Launcher("deepspeed", hostfile=hostfile).command(rank_arguments(), gpus=0, environment={})
    read = parse_args(rest)
    assert program == "deepspeed"
    assert fetch_hostfile(read.hostfile) == {"node1": 8, "node2": 8}
    assert (read.module, read.no_local_rank, read.user_script, read.user_args) == (True, True, "pipeline", RANK)
    assert read.num_gpus == -1

    here = parse_args(Launcher("deepspeed", nproc=2).command(rank_arguments(), gpus=4, environment={})[1:])
    assert (here.num_gpus, here.user_script, here.user_args) == (2, "pipeline", RANK)


def test_the_line_that_slurm_starts_makes_ranks_of_tasks(tmp_path: Path) -> None:
    """Slurm is not here: its shell line is run with the variables and the `scontrol` that a task would find."""
    command = Launcher("slurm", nproc=8, nodes=4).command(rank_arguments(), gpus=0, environment={})
    shape = ["--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--kill-on-bad-exit=1"]
    assert command[:5] == ["srun", *shape]
    assert command[-len(RANK) :] == RANK
    assert "--gpus-per-node=8" not in Launcher("slurm", nproc=8).command(
        RANK, gpus=0, environment={"DS_ACCELERATOR": "cpu"}
    )
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames n[3-6]" ] && printf "n3\\nn4\\nn5\\nn6\\n"\n')
    scontrol.chmod(0o755)
    shell = command[5 : command.index("asvr") + 1]
    variables = {"SLURM_PROCID": "9", "SLURM_NTASKS": "32", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1000123"}
    found = subprocess.run(
        [*shell, "env"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_STEP_NODELIST": "n[3-6]", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    seen = dict(line.split("=", 1) for line in found.stdout.splitlines())
    expected = {"RANK": "9", "WORLD_SIZE": "32", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "n3"}
    assert expected.items() <= seen.items()
    assert seen["MASTER_PORT"] == "20123"


def test_what_does_not_fit_together_is_wrong_usage(tmp_path: Path) -> None:
    for options, said in (
        (["--nodes", "2"], "--nodes is for --launcher torchrun or slurm"),
        (["--launcher", "torchrun", "--nodes", "2"], "--rendezvous HOST:PORT"),
        (["--launcher", "slurm"], "needs --nproc"),
        (["--launcher", "torchrun", "--hostfile", "h"], "--hostfile is for --launcher deepspeed"),
    ):
        found = subprocess.run(
            [sys.executable, "-m", "pipeline", "train", "r.yaml", *options],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert found.returncode == 2
        assert said in " ".join(found.stderr.split())


def test_more_ranks_than_gpus_and_a_missing_program_are_named() -> None:
    with pytest.raises(EnvironmentProblem, match=r"--nproc 3 is more than the 2 GPU"):
        Launcher("torchrun", nproc=3).command([], gpus=2, environment={})
    with pytest.raises(EnvironmentProblem, match=r"the program srun is not here: run this where Slurm's commands are"):
        find_program("srun", {"PATH": "/nowhere"})


def save_recipe(folder: Path, engine: str, address: str = "auto") -> Path:
    tokens = {
        "source": {"kind": "folder", "path": "images"},
        "geometry": {"mode": "pad", "size": 28},
        "tokenizer": {"kind": "fitted", "path": "codebook"},
        "engine": engine,
        "ray": {"address": address},
        "output": "tokens",
    }
    file = folder / "my recipe.yaml"
    file.write_text(yaml.safe_dump({"tokenize": {"vqa": tokens}}))
    return file


def test_a_submitted_job_is_the_same_command_on_the_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.dashboard.modules.job.cli import submit as ray_submit

    choice = Choice(save_recipe(tmp_path, "ray"), ["vqa"], ["tokenize.vqa.unit_size=2"], replace=True)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")  # which Ray would submit to, whatever its --address says
    submit.tokenize(choice, "http://head:8265", limit=5, dry_run=True)
    printed = shlex.split(capsys.readouterr().out)
    assert printed[:3] == ["env", "-u", "RAY_ADDRESS"]
    command = printed[3:]
    assert command[:3] == ["ray", "job", "submit"]
    read = ray_submit.make_context("submit", command[3:]).params
    assert read["address"] == "http://head:8265"
    asvr = ["asvr", "tokenize", str(tmp_path / "my recipe.yaml"), "--only", "vqa"]
    assert list(read["entrypoint"]) == [*asvr, "--set", "tokenize.vqa.unit_size=2", "--replace", "--limit", "5"]
    assert read["working_dir"] is None


@pytest.mark.parametrize(("engine", "address"), [("local", "auto"), ("ray", "local")])
def test_a_job_that_would_not_use_the_cluster_is_not_submitted(engine: str, address: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="token set vqa would not use the cluster"):
        submit.tokenize(Choice(save_recipe(tmp_path, engine, address)), "http://head:8265", dry_run=True)


def test_a_job_server_is_named_by_its_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray takes other addresses too, and tries for a minute when it is a job server's without `http://`."""
    assert run(["tokenize", str(save_recipe(tmp_path, "ray")), "--submit", "head:8265"]) == 2
    assert "such as http://HEAD:8265" in capsys.readouterr().err
