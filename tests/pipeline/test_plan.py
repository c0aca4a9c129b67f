"""`asvr plan` and `asvr run`: for each kind of change, exactly what runs again and why, on a real recipe that has run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from tiny_recipe import PICTURES, make_folder, recipe, save_picture

from pipeline.recipe import load_recipe
from pipeline.state import plan
from pipeline.steps import Step

ALL = ["codebook tiny", "token set vqa", "phase pretrain", "phase instruct", "export", "eval"]
FROM_SET, FROM_PRETRAIN, FROM_INSTRUCT = ALL[1:], ALL[2:], ALL[3:]


def asvr(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    found = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ASVR_CACHE": str(folder / "cache")},
    )
    assert found.returncode == code, found.stdout + found.stderr
    assert "Traceback" not in found.stderr
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole recipe has run, with one command. Tests put back what they change."""
    folder = tmp_path_factory.mktemp("recipe")
    make_folder(folder)
    before = steps_of(folder)
    assert [(step.title, step.state) for step in before] == [(title, "missing") for title in ALL]
    said = asvr(folder, "run", "recipe.yaml")
    assert said.stdout.splitlines()[-1] == "everything is fresh"
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))


def steps_of(folder: Path, *overrides: str) -> list[Step]:
    return plan(load_recipe(folder / "recipe.yaml", overrides))


@contextlib.contextmanager
def kept(*paths: Path) -> Iterator[None]:
    """Files as they were before the context, to the nanosecond; those that were not there are gone again."""
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) if path.exists() else None for path in paths}
    try:
        yield
    finally:
        for path, was in before.items():
            if was is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(was[0])
                os.utime(path, ns=(was[1], was[1]))


def flip_a_weight(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def edit_caption(file: Path) -> None:
    file.write_text(file.read_text().replace("Picture 3", "A picture"))


FILES: dict[str, tuple[str, Callable[[Path], None], list[str], dict[str, str]]] = {
    "image added": (
        "images/new.png",
        lambda path: save_picture(path, 9),
        FROM_SET,
        {"token set vqa": "1 image added", "phase pretrain": "its token set vqa will change"},
    ),
    "image edited": (
        "images/2.png",
        lambda path: save_picture(path, 9),
        FROM_SET,
        {"token set vqa": "1 image changed"},
    ),
    "image removed": ("images/2.png", Path.unlink, FROM_SET, {"token set vqa": "1 image removed"}),
    "caption edited": (
        "instruct.json",
        edit_caption,
        FROM_INSTRUCT,
        {"phase instruct": "records changed: instruct.json", "export": "phase instruct will change"},
    ),
    "held-out caption edited": ("held_out.json", edit_caption, ["eval"], {"eval": "held-out records changed"}),
    "caption of the first phase edited": (
        "pretrain.json",
        edit_caption,
        FROM_PRETRAIN,
        {"phase pretrain": "records changed: pretrain.json", "phase instruct": "phase pretrain will change"},
    ),
    "tokenizer weights": (
        "encoder/model.safetensors",
        flip_a_weight,
        ALL,
        {"codebook tiny": "encoder weights changed", "token set vqa": "its codebook tiny will change"},
    ),
    "language model": (
        "llama/model.safetensors",
        flip_a_weight,
        FROM_PRETRAIN,
        {"phase pretrain": "language model changed; language model's tokenizer changed"},
    ),
    "vision tower": (
        "tower/model.safetensors",
        flip_a_weight,
        FROM_PRETRAIN,
        {"phase pretrain": "vision tower changed"},
    ),
    "codebook file": (
        "codebook/codebook.safetensors",
        flip_a_weight,
        ALL,
        {"token set vqa": "its codebook tiny will change"},
    ),
}

SETTINGS: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "geometry": (
        "tokenize.vqa.geometry.mode=squash",
        FROM_SET,
        {"token set vqa": 'geometry changed: "pad" -> "squash"'},
    ),
    "codebook": ("codebooks.tiny.iterations=4", ALL, {"codebook tiny": "iterations changed: 3 -> 4"}),
    "objective": (
        "train.phases.instruct.objective.shift=next",
        FROM_INSTRUCT,
        {"phase instruct": 'shift of the objective changed: "none" -> "next"'},
    ),
    "no objective": ("train.phases.instruct.objective={kind: none}", FROM_INSTRUCT, {}),
    "learning rate": (
        "train.phases.instruct.lr=0.5",
        FROM_INSTRUCT,
        {"phase instruct": "learning rate changed: 2e-05 -> 0.5"},
    ),
    "learning rate of the first phase": ("train.phases.pretrain.lr=0.5", FROM_PRETRAIN, {}),
    "batch size": (
        "train.phases.instruct.batch_size=3",
        FROM_INSTRUCT,
        {"phase instruct": "batch size changed: 6 -> 3"},
    ),
    "questions of the evaluation": ("train.eval.limit=2", ["eval"], {"eval": "number of questions changed"}),
    "micro-batch size": ("train.phases.instruct.micro_batch_tokens=4096", [], {}),
    "batch size of the tokenizer": ("tokenize.vqa.batch_size=2", [], {}),
    "worker count of training": ("train.workers=2", [], {}),
    "worker count of tokenizing": ("tokenize.vqa.decode_threads=1", [], {}),
    "engine": ("tokenize.vqa.engine=ray", [], {}),
    "unit size": ("tokenize.vqa.unit_size=2", [], {}),
    "DeepSpeed stage": (
        "train.deepspeed={zero_optimization: {stage: 2}}",
        FROM_PRETRAIN,
        {"phase pretrain": "DeepSpeed settings changed"},
    ),
}


def check(steps: list[Step], rerun: list[str], why: dict[str, str]) -> None:
    assert [step.title for step in steps if step.state != "fresh"] == rerun
    assert {step.state for step in steps if step.title in rerun} <= {"stale"}
    found = {step.title: step for step in steps}
    for title, reason in why.items():
        assert found[title].why == reason


def test_nothing_changed_and_nothing_runs(finished: Path) -> None:
    assert [step.state for step in steps_of(finished)] == ["fresh"] * len(ALL)
    manifest = (finished / "tokens" / "manifest.json").stat().st_mtime_ns
    heavy = "{'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules)"
    for verb in ("plan", "run"):
        script = (
            f"import sys\nfrom pipeline.cli import run\ncode = run([{verb!r}, 'recipe.yaml'])\n"
            f"sys.exit(code or ', '.join({heavy}) or 0)"
        )
        said = subprocess.run([sys.executable, "-c", script], cwd=finished, capture_output=True, text=True, timeout=60)
        assert (said.returncode, said.stderr) == (0, ""), said.stderr
        assert said.stdout.splitlines()[-1] == "everything is fresh: nothing to do"
    assert (finished / "tokens" / "manifest.json").stat().st_mtime_ns == manifest


@pytest.mark.parametrize("change", FILES)
def test_a_changed_file_makes_exactly_these_steps_stale(change: str, finished: Path) -> None:
    name, edit, rerun, why = FILES[change]
    with kept(finished / name):
        edit(finished / name)
        check(steps_of(finished), rerun, why)


@pytest.mark.parametrize("change", SETTINGS)
def test_a_changed_setting_makes_exactly_these_steps_stale(change: str, finished: Path) -> None:
    override, rerun, why = SETTINGS[change]
    check(steps_of(finished, override), rerun, why)


def test_nothing_is_replaced_without_a_yes(finished: Path) -> None:
    change = ("--set", "train.phases.instruct.lr=0.5")
    said = asvr(finished, "run", "recipe.yaml", *change, code=5)
    assert said.stderr == (
        "error: this would replace phase instruct (learning rate changed: 2e-05 -> 0.5): nothing was begun; restore the "
        "settings, choose other outputs, or add --replace\n"
    )
    table = asvr(finished, "plan", "recipe.yaml", *change).stdout
    assert table.splitlines()[-1] == "asvr run recipe.yaml --replace brings it up to date; it replaces phase instruct"
    told = json.loads(asvr(finished, "plan", "recipe.yaml", *change, "--json").stdout)
    assert [step["state"] for step in told["steps"]] == ["fresh", "fresh", "fresh", "stale", "stale", "stale"]
    assert told["steps"][3]["reasons"] == ["learning rate changed: 2e-05 -> 0.5"]
    assert told["steps"][3]["replaces"] is True


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished folder to do things to; times are kept, so everything in it is fresh."""
    return shutil.copytree(finished, tmp_path / "copy", symlinks=True)


def test_only_what_is_stale_runs_and_what_it_replaces_is_kept(copy: Path) -> None:
    assert [step.state for step in steps_of(copy)] == ["fresh"] * len(ALL)
    codebook = (copy / "codebook" / "codebook.json").read_bytes()
    shards = {path.name for path in (copy / "tokens" / "shards").iterdir()}
    save_picture(copy / "images" / "new.png", 9)
    changed = recipe()
    changed["train"]["phases"][1]["lr"] = 0.01
    (copy / "recipe.yaml").write_text(yaml.safe_dump(changed))
    asvr(copy, "run", "recipe.yaml", code=5)
    assert {path.name for path in (copy / "tokens" / "shards").iterdir()} == shards

    said = asvr(copy, "run", "recipe.yaml", "--replace")
    assert "token set vqa: stale (1 image added)" in said.stderr
    assert said.stderr.count("was made with other settings: moved to") == 2
    assert (copy / "codebook" / "codebook.json").read_bytes() == codebook
    assert {path.name for path in (copy / "tokens" / "shards").iterdir()} > shards
    kept_phases = sorted(path.name.partition("-")[0] for path in (copy / "run" / "_replaced").iterdir())
    assert kept_phases == ["instruct", "pretrain"]
    assert [step.state for step in steps_of(copy)] == ["fresh"] * len(ALL)


def test_a_half_done_recipe_goes_on(copy: Path) -> None:
    (copy / "tokens" / "manifest.json").unlink()
    shutil.rmtree(copy / "run" / "instruct")
    shutil.rmtree(copy / "run" / "export")
    states = {step.title: (step.state, step.why) for step in steps_of(copy)}
    assert states["token set vqa"] == ("interrupted", "6 of 6 images committed")
    assert states["phase instruct"] == ("missing", "")
    (copy / "run" / "instruct" / "step_1.tmp").mkdir(parents=True)
    last = {step.title: step.state for step in steps_of(copy)}
    assert last["phase instruct"] == "interrupted"
    marker = copy / "run" / "pretrain" / "step_1" / "COMPLETE.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"final": False}))
    asvr(copy, "tokenize", "recipe.yaml")
    states = {step.title: (step.state, step.why) for step in steps_of(copy)}
    assert states["phase pretrain"] == ("interrupted", "goes on from step 1")
    assert states["token set vqa"][0] == "fresh"


def test_an_evaluation_is_that_of_the_recipe_s_checkpoint_and_data(copy: Path) -> None:
    results = copy / "run" / "eval" / "results.json"
    found = json.loads(results.read_text())
    assert found["made_from"]["checkpoint"]["phase"] == "instruct"
    assert found["questions"] == PICTURES
    for changed, why in (
        ({"checkpoint": None}, "it measured another checkpoint"),
        ({"model": "export"}, "it measured the export, which gives no losses"),
    ):
        results.write_text(json.dumps(found | {"made_from": found["made_from"] | changed}))
        check(steps_of(copy), ["eval"], {"eval": why})
    results.write_text(json.dumps({"losses": {}}))
    check(steps_of(copy), ["eval"], {"eval": "nothing says what it was made from"})
    assert "eval: 6 questions" in asvr(copy, "run", "recipe.yaml").stdout
    assert json.loads(results.read_text())["made_from"] == found["made_from"]
    results.unlink()
    assert [step.state for step in steps_of(copy)] == ["fresh"] * (len(ALL) - 1) + ["missing"]
    (copy / "held_out.json").unlink()
    assert steps_of(copy)[-1].state == "blocked"


def test_what_no_step_makes_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "llama")
    (copy / "pretrain.json").unlink()
    states = {step.title: step for step in steps_of(copy)}
    assert states["token set vqa"].state == "fresh"
    assert states["phase pretrain"].state == "blocked"
    said = asvr(copy, "run", "recipe.yaml", code=4)
    assert said.stderr.startswith("error: the data file ")
    assert said.stderr.count("\n") == 1


def test_a_source_that_is_not_there_is_named_before_the_first_step(tmp_path: Path) -> None:
    folder = make_folder(tmp_path).parent
    (folder / "images").rename(folder / "imgs")
    states = {step.name: step for step in steps_of(folder)[:2]}
    for step in states.values():
        assert step.state == "blocked"
        assert f"{folder / 'images'} does not exist: correct source." in step.reasons[0]
    said = asvr(folder, "run", "recipe.yaml", code=4).stderr
    assert "does not exist" in said
    assert not (folder / "codebook").exists()


def test_what_is_being_made_is_left_alone(copy: Path) -> None:
    from manifests.storage import Store

    save_picture(copy / "images" / "new.png", 9)
    with Store.open(copy / "tokens").lease("tokenize"):
        states = {step.title: step.state for step in steps_of(copy)}
        assert states["token set vqa"] == "running"
        assert "is being made already" in asvr(copy, "run", "recipe.yaml", "--replace", code=6).stderr


def test_torchrun_trains_what_is_missing_with_two_ranks(finished: Path, copy: Path) -> None:
    shutil.rmtree(copy / "run" / "instruct")
    torchrun = ("--launcher", "torchrun", "--nproc", "2")
    said = asvr(copy, "train", "recipe.yaml", *torchrun, "--dry-run").stdout
    assert said == f"torchrun --standalone --nproc-per-node=2 -m pipeline train {copy / 'recipe.yaml'}\n"
    assert not (copy / "run" / "instruct").exists()
    asvr(copy, "run", "recipe.yaml", *torchrun)
    assert [step.state for step in steps_of(copy)] == ["fresh"] * len(ALL)
    marker = json.loads((copy / "run" / "instruct" / "step_1" / "COMPLETE.json").read_text())
    assert marker["world_size"] == 2
    assert loss_of(copy) == pytest.approx(loss_of(finished), rel=1e-5)


def loss_of(folder: Path) -> float:
    """Of the last step of the second phase."""
    last = (folder / "run" / "instruct" / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["loss"])
