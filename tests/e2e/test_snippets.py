"""The snippets of recipes that the pages show."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
import yaml
from pages import PAGES, ROOT, blocks
from users_folder import asvr

BELOW = {"source": "tokenize", "geometry": "tokenize", "model": "train", "phases": "train", "objective": "phases"}
"""What a snippet that starts in the middle of a recipe belongs to."""


def snippets() -> list[Any]:
    """Each `yaml` block in parts, one for each key at its margin: a block may show the same key with several values."""
    found = []
    for page in PAGES:
        for number, block in enumerate(blocks(page, "yaml")):
            parts = re.split(r"^(?=\S)", re.sub(r"^#.*\n", "", block, flags=re.MULTILINE), flags=re.MULTILINE)
            found += [
                pytest.param(part, id=f"{page.name}-{number}-{place}") for place, part in enumerate(parts) if part
            ]
    return found


def whole(value: dict[str, Any]) -> dict[str, Any]:
    """The recipe that a snippet is a part of."""
    (key,) = value
    if BELOW.get(key) == "tokenize":
        return {"tokenize": {"any": value}}
    if BELOW.get(key) == "phases":
        return {"train": {"phases": [value]}}
    return {"train": value} if BELOW.get(key) == "train" else value


def written(value: Any) -> Any:
    """Without what a snippet leaves out: keys whose value is `...`, and a `...` that stands for more keys."""
    if isinstance(value, dict):
        return {key: written(item) for key, item in value.items() if "..." not in (key, item)}
    return [written(item) for item in value] if isinstance(value, list) else value


def optional(schema: Any) -> Any:
    """The schema of a part of a recipe: nothing is required."""
    if isinstance(schema, dict):
        return {key: optional(item) for key, item in schema.items() if key != "required"}
    return [optional(item) for item in schema] if isinstance(schema, list) else schema


@pytest.fixture(scope="module")
def parts() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(optional(json.loads(asvr("schema", cwd=ROOT))))


@pytest.mark.parametrize("snippet", snippets())
def test_a_snippet_of_a_recipe_has_only_keys_that_there_are(
    parts: jsonschema.Draft202012Validator, snippet: str
) -> None:
    parts.validate(whole(written(yaml.safe_load(snippet))))


def test_a_snippet_with_an_unknown_key_is_noticed(parts: jsonschema.Draft202012Validator) -> None:
    with pytest.raises(jsonschema.ValidationError):
        parts.validate(whole({"phases": [{"name": "instruct", "learning_rate": 1e-5}]}))
