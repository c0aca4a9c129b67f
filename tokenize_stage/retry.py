"""Reading that is tried again: storage that stutters must cost no image, and a dead one must not pass for bad images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from manifests.errors import StorageError

PAUSES_S = (0.1, 0.5, 2.0)
"""Pauses between attempts: four attempts in all."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


def with_retries(read: Callable[[], T], what: str) -> T:
    """The result of `read()`, tried again after an `OSError`; the last one becomes a `StorageError` naming `what`."""
    for pause in PAUSES_S:
        try:
            return read()
        except OSError as error:
            _log.warning("%s: %s; trying again in %.1f s", what, error.strerror or error, pause)
            time.sleep(pause)
    try:
        return read()
    except OSError as error:
        raise StorageError(
            f"{what} failed {len(PAUSES_S) + 1} times ({(error.strerror or str(error)).lower()}): "
            "check the disk or network it is on and run the command again"
        ) from error
