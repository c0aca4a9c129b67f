"""Documents of older schema versions are brought up to the present one, step by step, as they are read.

Version 1 is the only one so far. Whoever makes version 2 adds `1: function` to the table of each document that changed:
it takes the JSON object of version 1 and returns that of version 2. `tests/data/schema_v1` has to stay readable.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from manifests.errors import VerificationFailed
from manifests.schema import SCHEMA_VERSION

Document = TypeVar("Document", bound=BaseModel)
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]

MANIFEST_UPGRADES: Mapping[int, Upgrade] = {}
"""From version n of a manifest to version n + 1."""

RECORD_UPGRADES: Mapping[int, Upgrade] = {}
"""From version n of a commit record to version n + 1."""

READABLE_SHARDS = frozenset({"1"})
"""Versions of the shard columns that the reader understands; shards are never rewritten to be upgraded."""


def parsed(
    model: type[Document], data: bytes, upgrades: Mapping[int, Upgrade], where: str, *, newest: int = SCHEMA_VERSION
) -> Document:
    """A document from its JSON text, whatever version it was written in.

    Raises `ValidationError` for what is no such document, and `VerificationFailed` for one that a newer asvr wrote.
    A document of the present version is parsed once, by pydantic: there may be thousands of them.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError:
        document = _object(data)
        version = document.get("schema_version")
        if not isinstance(version, int) or version == newest:
            raise
    if version > newest:
        raise VerificationFailed(f"{where} has schema version {version}, this asvr reads up to {newest}: update asvr")
    while version < newest and version in upgrades:
        document = {**upgrades[version](document), "schema_version": version + 1}
        version += 1
    return model.model_validate_json(json.dumps(document))


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
