"""The JSON Schema of a recipe, with which an editor completes keys and underlines mistakes.

`pipeline/recipe.schema.json` is the published copy; a test keeps it equal to what the configuration models say.
What only the models can check (paths, names of sets, values that must fit each other) is not in it.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tokenize_stage.config import CodebookConfig, TokenSetConfig
from train_stage.config import TrainConfig


class _Recipe(BaseModel):
    """A run of ASVR: codebooks that are fitted, token sets that are made, and the training that uses them."""

    model_config = ConfigDict(extra="forbid", title="asvr recipe")

    codebooks: dict[str, CodebookConfig] = Field(default={}, description="for asvr fit-codebook, by name")
    tokenize: dict[str, TokenSetConfig] = Field(default={}, description="for asvr tokenize, by name")
    train: TrainConfig | None = Field(default=None, description="for asvr train")
    extends: str | None = Field(default=None, description="another recipe of the folder, which this one changes")
    set: dict[str, Any] = Field(default={}, description="dotted key: value, put into the recipe that `extends` names")


def recipe_schema() -> dict[str, Any]:
    """The schema, JSON Schema draft 2020-12."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_Recipe.model_json_schema()}
