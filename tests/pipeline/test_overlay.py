"""A recipe that extends another is that recipe with some values put in; an error names the file and line of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from manifests.errors import RecipeError
from pipeline.recipe import load_recipe

BASE = """\
tokenize:
  vqa:
    source:    {kind: folder, path: images/}
    geometry:  {mode: pad, size: 224}
    tokenizer: {kind: fitted, path: codebook/}
    unit_size: 128
    output: tokens/
train:
  output: run/
  model: {language_model: org/lm, vision_tower: org/tower}
  phases:
    - {name: pretrain, data: [{path: d.json, image_root: images}], manifests: [vqa], lr: 1e-3}
    - {name: instruct, data: [{path: d.json, image_root: images}], manifests: [vqa]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def overlay(folder: Path, text: str, name: str = "own.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def refusal(file: Path, *overrides: str, part: str = "train") -> str:
    with pytest.raises(RecipeError) as caught:
        getattr(load_recipe(file, overrides), part)()
    message = str(caught.value).replace(f"{file.parent}/", "")
    assert "\n" not in message
    return message


def test_values_are_put_in_and_the_rest_stays(folder: Path) -> None:
    text = (
        "extends: base.yaml\nset:\n  train.output: other/\n  train.phases.instruct.objective: {kind: none}\n"
        "  train.phases.1.lr: 3e-5\n  train.deepspeed.zero_optimization.stage: 2\n"
        "  tokenize.more: {source: {kind: folder, path: b}, geometry: {mode: pad, size: 8}, "
        "tokenizer: {kind: fitted, path: x}, output: more}\n"
    )
    recipe = load_recipe(overlay(folder, text))
    train = recipe.train()
    assert train.output == str(folder / "other")
    assert [phase.terms == () for phase in train.phases] == [False, True]
    assert [phase.lr for phase in train.phases] == [1e-3, 3e-5]
    assert train.deepspeed == {"zero_optimization": {"stage": 2}}
    assert list(recipe.token_sets()) == ["vqa", "more"]
    assert train.phases[0].manifests == (str(folder / "tokens"),)


def test_a_null_takes_a_section_out(folder: Path) -> None:
    file = overlay(folder, "extends: base.yaml\nset: {tokenize: null}\n")
    assert "has no tokenize: section" in refusal(file, part="token_sets")


def test_overlays_extend_overlays_and_the_command_line_comes_last(folder: Path) -> None:
    overlay(folder, "extends: base.yaml\nset: {train.seed: 1, train.phases.0.lr: 1}\n", "middle.yaml")
    file = overlay(folder, "extends: middle.yaml\nset: {train.seed: 2}\n")
    assert (load_recipe(file).train().seed, load_recipe(file).train().phases[0].lr) == (2, 1.0)
    assert load_recipe(file, ["train.seed=3"]).train().seed == 3


@pytest.mark.parametrize(
    ("text", "part", "message"),
    [
        ("set:\n  train.sede: 1\n", "train", "own.yaml:3: train.sede: unknown key; did you mean seed?"),
        (
            "set:\n  train.model:\n    language_model: a/b\n    vision_towr: c/d\n",
            "train",
            "own.yaml:5: train.model.vision_towr: unknown key; did you mean vision_tower?",
        ),
        ("set:\n  train.phases.instrct.lr: 1\n", "train", "own.yaml:3: set.train.phases.instrct.lr: train.phases has 2"),
        ("set:\n  train..x: 1\n", "train", "own.yaml:3: set.train..x: expected dotted.key=value"),
        ("set:\n  trian.seed: 1\n", "train", "own.yaml:3: trian: unknown key; did you mean train?"),
        ("set: [1]\n", "train", "own.yaml:2: set: must be a mapping of dotted keys to values"),
        ("train: {seed: 1}\n", "train", "own.yaml:2: train: a recipe that extends another has nothing but extends"),
        ("set:\n  tokenize.vqa.unit_size: x\n", "token_sets", "own.yaml:3: tokenize.vqa.unit_size: must be an integer"),
    ],
)  # fmt: skip
def test_errors_of_the_overlay_have_its_lines(folder: Path, text: str, part: str, message: str) -> None:
    assert refusal(overlay(folder, "extends: base.yaml\n" + text), part=part).startswith(message)


def test_errors_of_the_base_have_its_lines(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE.replace("unit_size", "unit_sise"))
    file = overlay(folder, "extends: base.yaml\nset: {train.seed: 1}\n")
    assert refusal(file, part="token_sets").startswith("base.yaml:6: tokenize.vqa.unit_sise: unknown key")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../base.yaml", "own.yaml:1: extends: must be the name of a recipe in the same folder"),
        ("[base.yaml]", "own.yaml:1: extends: must be the name of a recipe in the same folder"),
        ("nothing.yaml", "own.yaml:1: extends: there is no recipe nothing.yaml"),
        ("own.yaml", "own.yaml:1: extends: own.yaml extends itself in the end"),
        ("circle.yaml", "circle.yaml:1: extends: own.yaml extends itself in the end"),
    ],
)
def test_what_cannot_be_extended(folder: Path, name: str, message: str) -> None:
    overlay(folder, "extends: own.yaml\n", "circle.yaml")
    assert refusal(overlay(folder, f"extends: {name}\n")).startswith(message)
