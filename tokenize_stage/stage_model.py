"""What all configuration of this stage has in common. Imports no torch and no ray."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

from manifests.paths import StorePath


class StageModel(BaseModel):
    """Base of this stage's configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


StoragePath = Annotated[StorePath, BeforeValidator(lambda path: str(path) if isinstance(path, PurePath) else path)]
"""A path or URL, as text."""
