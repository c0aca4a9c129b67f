"""Marks for configuration fields that hold a location, so that whoever reads a recipe knows what to resolve.

A marked field is plain text for its owner. A field of type `pathlib.Path` needs no mark: it is a `LocalPath`.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated


class Location(Enum):
    """What the text of a field may name beside a file or folder; relative ones are relative to the recipe file."""

    LOCAL = "a file or folder"
    STORE = "a file or folder, or the URL of one in an object store"
    HUB = "a folder, else a model of the Hugging Face Hub"
    MANIFEST = "a token set of the same recipe, else a manifest's folder or its URL"


LocalPath = Annotated[str, Location.LOCAL]
StorePath = Annotated[str, Location.STORE]
HubOrPath = Annotated[str, Location.HUB]
ManifestRef = Annotated[str, Location.MANIFEST]
