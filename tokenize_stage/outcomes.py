"""What becomes of an image (a picture or a reject) and of a unit (done or failed). Each outcome is a type."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manifests.commits import CommitRecord


@dataclass(frozen=True)
class Picture:
    """What stays of a decoded image beside its pixels; its other outcome is `manifests.rejects.Reject`."""

    sha256: str
    width: int
    height: int
    boxes_V4: npt.NDArray[np.float32]
    length: int


@dataclass(frozen=True)
class UnitMetrics:
    """How a unit went, for `metrics.jsonl`.

    `waited`: the seconds the encoder stood still for decoded images; `gap`: those it stood still between the unit
    before and this one; `device_memory`: the most bytes the worker has held on its device, 0 on a CPU.
    """

    images: int
    encoded: int
    copied: int
    rejected: int
    seconds: float
    waited: float
    worker: str
    gap: float = 0.0
    device_memory: int = 0


@dataclass(frozen=True)
class UnitDone:
    """A unit whose shard is written: the driver commits the record."""

    record: CommitRecord
    metrics: UnitMetrics


@dataclass(frozen=True)
class UnitFailed:
    """A unit whose images the storage would not give: it stays undone, and the next run takes it again."""

    unit: str
    message: str
