"""The launch files are what Docker, Kubernetes and Slurm read, and their commands are commands that exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from pipeline.cli import app

DOCKER = Path(__file__).parents[2] / "docker"
KUBERNETES = "1.34"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DOCKER / name).read_text()))


def pod(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}


def test_the_compose_file_follows_the_compose_specification() -> None:
    (compose,) = documents("compose.yaml")
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    validator = jsonschema.Draft202012Validator(json.loads(schema.read_text()))
    validator.validate(compose)
    assert not validator.is_valid({"services": {"head": {**compose["services"]["head"], "imagee": "x"}}})
    for service in compose["services"].values():
        if "build" in service:
            context = (DOCKER / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]).is_file()
        assert set(service.get("depends_on", [])) <= set(compose["services"])


def test_the_training_job_is_valid_for_kubernetes() -> None:
    for document in documents("kubernetes/train.yaml"):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    job = documents("kubernetes/train.yaml")[1]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    nodes = {variable["name"]: variable["value"] for variable in container["env"]}["NODES"]
    assert job["completions"] == job["parallelism"] == int(nodes)
    assert job["template"]["spec"]["subdomain"] == documents("kubernetes/train.yaml")[0]["metadata"]["name"]


def test_the_ray_job_has_valid_pods_and_a_shape_that_kuberay_takes() -> None:
    """KubeRay's own definition is in no package; the fields used here are checked by name, and its pods in full."""
    (job,) = documents("kubernetes/tokenize.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"].pop("rayClusterSpec")
    assert set(job["spec"]) <= {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit"}
    assert set(cluster) <= {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    assert set(cluster["headGroupSpec"]) <= {"rayStartParams", "template"}
    (workers,) = cluster["workerGroupSpecs"]
    assert set(workers) <= {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    for group in (cluster["headGroupSpec"], workers):
        kubernetes_validate.validate(pod(group["template"]), KUBERNETES, strict=True)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    pinned = re.search(r"^ray==(.*)$", (DOCKER.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert cluster["rayVersion"] == pinned[1]


def test_kubernetes_refuses_what_is_wrong() -> None:
    job = documents("kubernetes/train.yaml")[1]
    job["spec"]["completion"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


@pytest.mark.parametrize("script", sorted(DOCKER.glob("slurm/*.sbatch")), ids=lambda path: path.name)
def test_slurm_scripts(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    last_directive = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    # Slurm reads directives up to the first command.
    assert all(line.startswith("#") for line in lines[: last_directive + 1])
    without = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert without.returncode == 1
    assert f"usage: sbatch {script.name} RECIPE" in without.stderr


def commands(program: str) -> list[str]:
    """Every command line of `program` in the launch files, whose comments show some of Docker."""
    found = []
    for path in sorted(path for path in DOCKER.rglob("*") if path.is_file() and path.name != "setup.sh"):
        text = path.read_text().replace("\\\n", " ").replace('"$0"', "recipe.yaml").replace('"$recipe"', "recipe.yaml")
        for line in text.splitlines():
            if line.startswith("#   docker") or not line.lstrip().startswith("#"):
                shown = re.search(rf"(?<![\w/-]){program} (?=[a-z-])([^'|;&,>\]]*)", line)
                if shown:
                    found.append(f"{path.name}: {program} {shown[1].partition('  ')[0].strip()}")
    return found


@pytest.mark.parametrize("line", [*commands("asvr"), *commands("-m pipeline")])
def test_the_commands_are_ours(line: str) -> None:
    arguments = shlex.split(re.split(r"asvr |-m pipeline ", line, maxsplit=1)[1])
    if arguments == ["--help"]:
        return
    root = get_command(app)
    assert isinstance(root, click.Group) or hasattr(root, "commands")
    command = root.commands[arguments[0]]  # type: ignore[attr-defined]
    context = command.make_context(arguments[0], arguments[1:])
    assert "recipe.yaml" in str(context.params["recipe"])


@pytest.mark.parametrize("line", commands("ray"))
def test_the_commands_of_ray_exist(line: str) -> None:
    from ray.scripts.scripts import cli

    arguments = shlex.split(line.partition(" ray ")[2].replace('"$RAY_ADDRESS"', "head:6379"))
    command: Any = cli
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(name, arguments)


def test_there_are_commands_to_check() -> None:
    assert len(commands("asvr")) >= 6
    assert len(commands("-m pipeline")) == 1
    assert len(commands("ray")) >= 6


def test_torchrun_takes_the_options_of_the_training_job() -> None:
    from torch.distributed.run import get_args_parser

    (container,) = documents("kubernetes/train.yaml")[1]["spec"]["template"]["spec"]["containers"]
    line = container["args"][0].replace("$NODES", "2").replace("$JOB_COMPLETION_INDEX", "0")
    parsed = get_args_parser().parse_args(shlex.split(line)[2:])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.training_script) == ("2", "8", "pipeline")
    assert parsed.training_script_args == ["train", "/data/recipe.yaml"]
