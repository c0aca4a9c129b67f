"""Marks for configuration fields that hold a location, so that whoever reads a recipe knows what to resolve.

A marked field is plain text for its owner. A field of type `pathlib.Path` needs no mark: it is a `LocalPath`.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated


class Location(Enum):
    """What the text of a field may name beside a file or folder; relative ones are relative to the recipe file."""

    LOCAL = "a file or folder"
    HUB = "a folder, else a model of the Hugging Face Hub"
    MANIFEST = "a token set of the same recipe, else a manifest's folder"


LocalPath = Annotated[str, Location.LOCAL]
HubOrPath = Annotated[str, Location.HUB]
ManifestRef = Annotated[str, Location.MANIFEST]
