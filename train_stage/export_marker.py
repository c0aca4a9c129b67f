"""`asvr_export.json`: the sign that a folder is an export of ours, and which checkpoint it was made from. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from manifests.fingerprint import digest
from train_stage.checkpoint import Checkpoint

MARKER_FILE = "asvr_export.json"
MADE_FROM = "made_from"


def origin_of(checkpoint: Checkpoint, phase: str) -> dict[str, Any]:
    """What an export of a checkpoint says that it was made from: equal for checkpoints with equal weights."""
    return {"phase": phase, "step": checkpoint.step, "settings": digest(checkpoint.settings)}


def read_origin(folder: Path) -> dict[str, Any] | None:
    """What the export in `folder` was made from; None where none is, or one of an earlier version."""
    try:
        marker = json.loads((folder / MARKER_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    origin = marker.get(MADE_FROM) if isinstance(marker, dict) else None
    return origin if isinstance(origin, dict) else None
