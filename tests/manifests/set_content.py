"""Sets with chosen images, and all that a set says of each of its images."""

from __future__ import annotations

from pathlib import Path

from made_sets import assemble, commit_unit

from manifests.reader import open_manifest
from manifests.storage import Store


def one_set(folder: Path, units: dict[str, list[str]], rejected: set[str] = frozenset(), **changes) -> Path:
    """A set whose codes depend on the unit's name."""
    store = Store.open(folder)
    for number, (unit, ids) in enumerate(units.items()):
        commit_unit(store, unit, ids, rejected, seed=changes.pop("seed", 0) + number)
    assemble(store, **changes)
    return folder


def held(folder: Path) -> dict[str, tuple]:
    """Each ok image with all that a set says of it, and each reject with its reason."""
    opened = open_manifest(folder)
    index = (
        opened.index().select(["image_id", "sha256", "width", "height", "source_size", "source_mtime_ns"]).to_pylist()
    )
    ids = [row["image_id"] for row in index]
    values = opened.read_codes(ids) if opened.manifest.tokenizer else opened.read_features(ids)
    found = {row["image_id"]: (*row.values(), codes.tobytes()) for row, codes in zip(index, values, strict=True)}
    return found | {row["image_id"]: (row["reason"], row["message"]) for row in opened.rejects().to_pylist()}
