"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from manifests.errors import RecipeError
from pipeline.recipe import load_recipe

README = (Path(__file__).parents[2] / "README.md").read_text()


def shown_recipe() -> str:
    found = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert found
    return found[1]


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(shown_recipe())
    recipe = load_recipe(file)
    assert list(recipe.token_sets()) == ["vqa"]
    assert list(recipe.codebooks()) == ["mine"]
    assert [phase.name for phase in recipe.train().phases] == ["pretrain", "instruct"]


def test_a_wrong_key_gives_the_shown_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(shown_recipe().replace("unit_size:", "unit_sise:"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("recipe.yaml")).token_sets()
    assert f"error: {caught.value}" in README
