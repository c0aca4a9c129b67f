"""The recipes of the paper's experiments: each is valid, and says what its experiment is."""

from __future__ import annotations

from pathlib import Path

import pytest

import pipeline
from pipeline.recipe import load_recipe

FOLDER = Path(pipeline.__file__).parent / "recipes"
VICUNA, SIGLIP = "lmsys/vicuna-7b-v1.5", "google/siglip-so400m-patch14-384"

EXPERIMENTS = {
    # language model, vision tower, terms of each phase, instruct geometry, instruct data
    "llava15_7b": (VICUNA, SIGLIP, (["codes"], ["codes"]), "pad", "llava_v1_5_mix665k.json"),
    "llava15_13b": ("lmsys/vicuna-13b-v1.5", SIGLIP, (["codes"], ["codes"]), "pad", "llava_v1_5_mix665k.json"),
    "llava15_mistral_7b": (
        "mistralai/Mistral-7B-Instruct-v0.2", SIGLIP, (["codes"], ["codes"]), "pad", "llava_v1_5_mix665k.json",
    ),
    "llava15_7b_text_only": (VICUNA, SIGLIP, ([], []), "pad", "llava_v1_5_mix665k.json"),
    "llava15_7b_instruct_only": (VICUNA, SIGLIP, ([], ["codes"]), "pad", "llava_v1_5_mix665k.json"),
    "llava15_7b_appearance": (VICUNA, SIGLIP, (["codes"], ["codes"]), "pad", "llava_v1_5_mix665k.json"),
    "llava15_7b_both": (VICUNA, SIGLIP, (["codes", "codes"], ["codes", "codes"]), "pad", "llava_v1_5_mix665k.json"),
    "llava15_7b_denoise": (VICUNA, SIGLIP, (["denoise"], ["denoise"]), "pad", "llava_v1_5_mix665k.json"),
    "llava_next_7b": (VICUNA, SIGLIP, (["codes"], ["codes"]), "pad", "llava_next_779k.json"),
    "llava_next_7b_anyres": (VICUNA, SIGLIP, (["codes"], ["codes"]), "anyres", "llava_next_779k.json"),
    "llava_next_7b_siglip2": (
        VICUNA, "google/siglip2-so400m-patch14-384", (["codes"], ["codes"]), "pad", "llava_next_779k.json",
    ),
}  # fmt: skip


def test_every_recipe_has_its_experiment() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_recipe_is_valid_and_says_its_experiment(name: str) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    sets, train = recipe.token_sets(), recipe.train()
    first, second = train.phase("pretrain"), train.phase("instruct")
    found = (
        train.model.language_model,
        train.model.vision_tower,
        ([term.kind for term in first.terms], [term.kind for term in second.terms]),
        sets["instruct"].geometry.mode,
        Path(second.data[0].path).name,
    )
    assert found == EXPERIMENTS[name]
    assert (first.lr, first.batch_size, second.lr, second.batch_size) == (1e-3, 256, 2e-5, 128), "of the release"
    assert train.output.endswith(name), "no two experiments share a folder"


def test_experiments_with_other_codes_have_other_outputs() -> None:
    """So that running one after the other redoes no token set, and mixes none."""
    owners: dict[str, str] = {}
    for name in EXPERIMENTS:
        for own in load_recipe(FOLDER / f"{name}.yaml").token_sets().values():
            settings = repr((own.source, own.geometry, own.tokenizer))
            assert owners.setdefault(own.output, settings) == settings, name


def test_a_phase_trains_a_head_where_it_has_terms() -> None:
    for name in EXPERIMENTS:
        train = load_recipe(FOLDER / f"{name}.yaml").train()
        for phase in (train.phase(own.name) for own in train.phases):
            assert ("visual_head" in phase.trainable) == bool(phase.terms), name


def test_only_the_head_of_the_appearance_experiment_looks_at_another_layer() -> None:
    layers = {
        name: {key: book.encoder.layer for key, book in load_recipe(FOLDER / f"{name}.yaml").codebooks().items()}
        for name in ("llava15_7b", "llava15_7b_appearance", "llava15_7b_both")
    }
    assert layers == {
        "llava15_7b": {"siglip": -2},
        "llava15_7b_appearance": {"siglip": 6},
        "llava15_7b_both": {"siglip": -2, "appearance": 6},
    }
