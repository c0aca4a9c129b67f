"""`asvr train --check`: every shipped recipe passes it on made-up data, and says all it lacks without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_set
from tiny_models import save_language_model

import pipeline
from manifests.errors import InputError, RecipeError
from manifests.schema import FeaturesSpec
from pipeline.recipe import Recipe, load_recipe
from pipeline.train_check import check_run

RECIPES = sorted((Path(pipeline.__file__).parent / "recipes").glob("*.yaml"))
SHAPES = Path(__file__).parents[1] / "data" / "model_shapes"
"""config.json of the public models that the recipes name, without weights."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes, and a tokenizer of characters."""
    folder = tmp_path_factory.mktemp("recipes")
    for path in RECIPES:
        shutil.copy(path, folder)
    save_language_model(folder / "tokenizer", tied=False)
    return folder


def overrides(recipe: Recipe, place: Path) -> list[str]:
    """The recipe's models as folders that hold their shapes."""
    model = recipe.train().model
    return [
        f"train.model.language_model={SHAPES / model.language_model.split('/')[-1]}",
        f"train.model.vision_tower={SHAPES / model.vision_tower.split('/')[-1]}",
        f"train.model.tokenizer={place / 'tokenizer'}",
    ]


def make_inputs(recipe: Recipe) -> None:
    """Three samples for every file of records, and a small set in every token set's output."""
    train = recipe.train()
    for phase in train.phases:
        for data in phase.data:
            root = Path(data.image_root)
            ids = tiny_set.save_pictures(root, 3)
            path = Path(data.path)
            tiny_set.save_captions(path, ids)
    for name, own in recipe.token_sets().items():
        output = Path(own.output)
        if output.exists():
            continue
        root = Path(train.phases[0].data[0].image_root)
        ids = tiny_set.save_pictures(root, 3)
        side = own.geometry.size // 14
        if own.tokenizer.kind == "vae":
            spec = FeaturesSpec(
                kind="vae", origin=name, weights_sha256={}, view_size=own.geometry.size, grid=(54, 54), width=32,
                dtype="float32", settings={},
            )  # fmt: skip
            values = np.zeros((3, 54 * 54, 32), np.float32)
            tiny_set.save_features(output, root, ids, spec, values, geometry=own.geometry.resolve())
        else:
            tiny_set.save_manifest(output, root, ids, geometry=own.geometry.resolve(), grid=(side, side))


def check(recipe: Path, place: Path, *more: str, gpu: str = "H100") -> None:
    loaded = load_recipe(recipe, [*overrides(load_recipe(recipe), place), *more])
    check_run(loaded.train(), gpu=gpu, gpus=8, mfu=0.4)


@pytest.mark.parametrize("name", [path.name for path in RECIPES])
def test_a_shipped_recipe_passes_on_the_meta_device(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(place / name)
    make_inputs(recipe)
    check(place / name, place)
    said = capsys.readouterr().out
    assert said.count("\nphase ") + said.startswith("phase ") == len(recipe.train().phases)
    assert "no problem was found" in said


def test_all_that_is_missing_is_said_at_once(tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(place / "llava15_7b.yaml", tmp_path)
    with pytest.raises(InputError, match=r"^6 problem\(s\) keep this run from starting"):
        check(tmp_path / "llava15_7b.yaml", place)
    said = capsys.readouterr().out
    wanted = ("blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images", "mix665k.json", "LLaVA-Instruct/images")
    for missing in (*wanted, "tokens/pretrain", "tokens/instruct"):
        assert [line for line in said.splitlines() if line.startswith("problem: ") and missing in line], missing


def test_a_grid_a_template_and_a_length_that_do_not_fit_are_problems(
    tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "llava15_7b.yaml"
    shutil.copy(place / recipe.name, recipe)
    loaded = load_recipe(recipe)
    make_inputs(loaded)
    own = loaded.token_sets()["pretrain"]
    shutil.rmtree(own.output)
    root = Path(loaded.train().phases[0].data[0].image_root)
    ids = sorted(path.name for path in root.iterdir())
    tiny_set.save_manifest(Path(own.output), root, ids, geometry=own.geometry.resolve(), grid=(24, 24))
    records = Path(loaded.train().phases[1].data[0].path)
    talks = json.loads(records.read_text())
    talks[0]["conversations"][0]["value"] = "no image token"
    records.write_text(json.dumps(talks))
    longer = ("train.phases.instruct.max_length=5000", "train.phases.instruct.micro_batch_tokens=5000")
    with pytest.raises(InputError, match=r"^2 problem\(s\)"):
        check(recipe, place, *longer)
    said = capsys.readouterr().out
    assert "24x24 positions a view and the vision tower makes 27x27" in said
    assert "does not fit template vicuna_v1" in said
    assert "note: phase instruct: max_length 5000 is more than the 4096 positions" in said


def test_an_unknown_gpu_is_refused(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"no peak is known of it; there are .*H100"):
        check(place / "llava15_7b.yaml", place, gpu="Voodoo")


def test_the_command_checks_and_starts_nothing(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "train", str(place / "llava15_7b.yaml"), "--check"]
    flags = [flag for own in overrides(load_recipe(place / "llava15_7b.yaml"), place) for flag in ("--set", own)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode in (0, 4), done.stderr  # by whether a test before this one made the data
    assert ("no problem was found" in done.stdout) == (done.returncode == 0)
    assert not (place / "runs").exists()
