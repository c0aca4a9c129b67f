"""Phases that are to be trained anew are moved to RUN/_replaced: days of work are not deleted by a changed setting."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from manifests.atomic import make_folder, storage_errors
from manifests.storage import Store

log = logging.getLogger(__name__)

REPLACED = "_replaced"
"""No phase has this name, since the names of phases begin with a letter or a digit."""


def move_aside(run: Path, phases: Sequence[str]) -> list[Path]:
    """Rename the folders of `phases`, given in the order of the run, into RUN/_replaced; where they are now.

    The last phase goes first, so that a kill in between leaves the beginning of a run, which is a run. Holds the run's
    lease: LeaseHeld while it is being trained. Raises StorageError when a disk refuses.
    """
    if not phases:
        return []
    moved = []
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    with Store.open(run).lease("replace"), storage_errors("move", run):
        make_folder(run / REPLACED)
        for name in reversed(phases):
            place = run / REPLACED / f"{name}-{now}"
            (run / name).rename(place)
            moved.append(place)
            log.info("phase %s was made with other settings: moved to %s, which you may delete", name, place)
    return moved
