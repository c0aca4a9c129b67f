"""What an evaluation measures, and what its results say that they were made from. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import InputError
from manifests.hashes import file_sha256

if TYPE_CHECKING:
    from train_stage.config import TrainConfig, ValidationConfig

FOLDER, RESULTS, ANSWERS = "eval", "results.json", "answers.jsonl"
"""Below the run, or beside the export: what was measured, and every question with its answer."""

MADE_FROM = "made_from"


def held_out_of(config: TrainConfig, phase: str) -> ValidationConfig:
    """The held-out data that a run's configuration names: that of `eval`, else what the phase is validated on.

    Raises InputError when it names none.
    """
    own, validation = config.eval, config.phase(phase).validation
    if own is not None and own.data:
        from train_stage.config import ValidationConfig

        return ValidationConfig(data=own.data, manifests=own.manifests)
    if validation is None:
        raise InputError(
            f"phase {phase} of {config.output} has no validation data in its recipe: give --data and --image-root"
        )
    return validation.model_copy(update={"manifests": (own.manifests if own else ()) or validation.manifests})


def made_from_run(
    config: TrainConfig,
    phase: str,
    checkpoint: dict[str, Any] | None,
    held_out: ValidationConfig,
    limit: int | None,
    content: Callable[[str], str],
) -> dict[str, Any]:
    """What the results of a run's checkpoint say of themselves: records and token sets by content, the settings as they are.

    `checkpoint` is `origin_of` it; `content` stands for the content of a manifest. Raises InputError for missing records.
    """
    own = config.phase(phase).all_manifests.values()
    manifests = held_out.manifests or dict.fromkeys(path for group in own for path in group)
    return {
        "model": "run",
        "checkpoint": checkpoint,
        "records": records_digests(data.path for data in held_out.data),
        "manifests": [content(path) for path in manifests],
        "limit": limit,
    }


def records_digests(paths: Iterable[str]) -> list[str]:
    """The sha256 of each file of held-out records; InputError where one is not there."""
    found = []
    for path in paths:
        if not Path(path).is_file():
            raise InputError(
                f"the held-out records {path} do not exist: check --data, or eval.data and validation.data in the recipe"
            )
        found.append(file_sha256(Path(path)))
    return found


def read_made_from(folder: Path) -> dict[str, Any] | None:
    """What the results in `folder` were made from; None where none are, or those of an earlier version."""
    try:
        results = json.loads((folder / RESULTS).read_bytes())
    except (OSError, ValueError):
        return None
    found = results.get(MADE_FROM) if isinstance(results, dict) else None
    return found if isinstance(found, dict) else None
