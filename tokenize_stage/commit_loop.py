"""The driver's loop: hand units to the engine and commit each one that comes back. Hold the lease."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field

from manifests.commits import write_commit
from manifests.errors import StorageError
from tokenize_stage.budget import RejectRuns
from tokenize_stage.engines import run_units
from tokenize_stage.outcomes import UnitDone, UnitFailed
from tokenize_stage.planned import Planned
from tokenize_stage.progress import Progress, Tracker
from tokenize_stage.units import PlannedUnits

FAILED_UNITS_IN_A_ROW = 3
"""So many units whose source cannot be read mean that the storage is gone: the job stops."""

_log = logging.getLogger(__name__)


@dataclass
class Work:
    """What a run has done: images by what became of them, and the bytes of the shards they are in."""

    images: int = 0
    encoded: int = 0
    copied: int = 0
    rows: int = 0
    bytes: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    workers: set[str] = field(default_factory=set)

    def add(self, done: UnitDone) -> None:
        """A committed unit."""
        record, metrics = done.record, done.metrics
        self.images += metrics.images
        self.encoded += metrics.encoded
        self.copied += metrics.copied
        self.rejects.update(row.reason for row in record.rejects)
        self.workers.add(metrics.worker)
        if record.shard:
            self.rows += record.shard.rows
            self.bytes += record.shard.bytes


def commit_units(planned: Planned, units: PlannedUnits, progress: Progress | None) -> Work:
    """Tokenize `units`, some or all of the plan's, and commit each as it comes.

    Raises `BudgetExceeded`, `StorageError` when units could not be read, and what the engine raises; what is committed
    stays committed.
    """
    work = Work()
    if not len(units):
        return work
    job, budget = planned.job, planned.budget
    whole = planned.plan.units
    tracker = Tracker(
        job.store,
        progress,
        done=planned.inventory.images - whole.images,
        total=planned.inventory.images - whole.images + units.images,
        units_done=planned.units_total - len(whole),
        units_total=planned.units_total - len(whole) + len(units),
    )
    tracker.start(budget.rejected)
    in_a_row = 0
    failed: list[UnitFailed] = []
    runs = RejectRuns.of_units(job.config.max_consecutive_rejects, whole)
    ray = job.config.ray if job.config.engine == "ray" else None
    with closing(
        run_units(planned.job.work_order(planned.inventory.images_at), units, ray=ray, on_running=tracker.on_running)
    ) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, UnitFailed):
                _log.error("unit %s failed: %s", outcome.unit, outcome.message)
                failed.append(outcome)
                in_a_row += 1
                if in_a_row == FAILED_UNITS_IN_A_ROW:
                    break
                continue
            in_a_row = 0
            runs.add(outcome.record)
            job.store.check_lease()
            write_commit(job.store, outcome.record)
            budget.count(outcome.record)
            tracker.on_unit(outcome, budget.rejected)
            work.add(outcome)
            budget.check()
    if failed:
        raise StorageError(
            f"{len(failed)} of {len(units)} units could not be read (first {failed[0].unit}: {failed[0].message}); "
            "the other units are kept"
        )
    tracker.close()
    return work
