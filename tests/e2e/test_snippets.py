"""The snippets of recipes that the pages show."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pages import PAGES, ROOT, blocks
from users_folder import asvr

from pipeline.recipe import load_recipe

BELOW = {"source": "tokenize", "geometry": "tokenize", "model": "train", "phases": "train", "objective": "phases"}
"""What a snippet that starts in the middle of a recipe belongs to."""


def snippets() -> list[Any]:
    """Each `yaml` block of the pages, in parts: one for each key at its margin."""
    found = []
    for page in PAGES:
        for number, block in enumerate(blocks(page, "yaml")):
            # What is commented out is another value for the key before it.
            text = re.sub(r"^( *)# (\w+: [{\[])", r"\1\2", block, flags=re.MULTILINE)
            parts = re.split(r"^(?=[^\s#])", text, flags=re.MULTILINE)
            found += [
                pytest.param(part, id=f"{page.name}-{number}-{place}")
                for place, part in enumerate(part for part in parts if yaml.safe_load(part) is not None)
            ]
    return found


def readings(part: str) -> list[Any]:
    """The values of a part, which may show one key several times: with the first of each, the second, and so on."""
    root = yaml.compose(part)
    keys = [[key.value for key, _ in node.value] for node in every_node(root) if isinstance(node, yaml.MappingNode)]
    most = max(count for own in keys for count in Counter(own).values())
    return [read(root, number) for number in range(most)]


def every_node(node: yaml.Node) -> Iterator[yaml.Node]:
    """A node and all below it."""
    yield node
    if isinstance(node, yaml.CollectionNode):
        for item in node.value:
            for below in item if isinstance(item, tuple) else (item,):
                yield from every_node(below)


def read(node: yaml.Node, number: int) -> Any:
    """The value of a node, of keys shown several times the one of that number, or the last."""
    if isinstance(node, yaml.MappingNode):
        shown: dict[Any, list[yaml.Node]] = {}
        for key, item in node.value:
            shown.setdefault(read(key, 0), []).append(item)
        return {key: read(items[min(number, len(items) - 1)], number) for key, items in shown.items()}
    if isinstance(node, yaml.SequenceNode):
        return [read(item, number) for item in node.value]
    return yaml.SafeLoader("").construct_object(node)


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
    for value in readings(snippet):
        parts.validate(whole(written(value)))


@pytest.mark.parametrize(("first", "second"), [("learning_rate: 1", "lr: 1"), ("lr: 1", "learning_rate: 1")])
def test_an_unknown_key_is_noticed(parts: jsonschema.Draft202012Validator, first: str, second: str) -> None:
    """In whichever of several values that a snippet shows for a key."""
    values = readings(f"phases:\n  - {{name: instruct, {first}}}\nphases:\n  - {{name: instruct, {second}}}\n")
    assert len(values) == 2
    wrong = [value for value in values if not parts.is_valid(whole(value))]
    assert wrong == [values[0] if "rate" in first else values[1]]


def test_the_recipe_that_extends_another_is_one(tmp_path: Path) -> None:
    """`set:` holds dotted keys, which no schema knows."""
    (snippet,) = blocks(ROOT / "docs" / "recipes.md", "yaml")
    shutil.copy(ROOT / "pipeline" / "recipes" / "llava15_7b.yaml", tmp_path)
    (tmp_path / "recipe.yaml").write_text(snippet)
    assert load_recipe(tmp_path / "recipe.yaml").train().phase("instruct").lr == 1e-5
