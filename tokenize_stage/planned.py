"""What a run is going to do, decided before anything is written, from the inventory and the commit records alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenize_stage.budget import RejectBudget
from tokenize_stage.inventory_cache import Listing
from tokenize_stage.output_folder import Folder
from tokenize_stage.resolved import Job
from tokenize_stage.source_config import has_own_ids
from tokenize_stage.sources import Inventory
from tokenize_stage.sources.inventory import ABSENT
from tokenize_stage.table_rows import numbers
from tokenize_stage.units import Plan, plan_units


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made from. `stale`: units whose records have to go, for another reason than the plan's."""

    job: Job
    listing: Listing
    plan: Plan
    stale: list[str]
    units_total: int
    budget: RejectBudget

    @property
    def inventory(self) -> Inventory:
        return self.listing.inventory


def plan_job(job: Job, listing: Listing, *, replace: bool, retry: frozenset[str]) -> Planned:
    """Compare the source with what is committed. Writes nothing.

    `retry`: reasons whose rejects are to be read again. Raises `FingerprintMismatch` and `VerificationFailed`.
    """
    inventory = listing.inventory
    own_ids = has_own_ids(job.config.source)
    folder = Folder(job.store, job.fingerprint, replace=replace, retry=retry, own_ids=own_ids)
    plan = plan_units(inventory.table, folder.units(), job.unit_size, retry)
    again = {cut.name for cut in plan.units.cuts}
    standing = folder.rejects.keys() - set(plan.emptied)
    budget = RejectBudget(
        inventory.images,
        job.config.max_reject_rate,
        by_unit={name: folder.rejects[name] for name in sorted(standing - again)},
        example=folder.example,
    )
    _expect_missing(budget, inventory, plan)
    return Planned(job, listing, plan, folder.stale, len(standing | again), budget)


def _expect_missing(budget: RejectBudget, inventory: Inventory, plan: Plan) -> None:
    """Count the rejects that are certain before anything is read: files that are not there."""
    absent = numbers(inventory.table["size"]) == ABSENT
    if not absent.any():
        return
    for cut in plan.units.cuts:
        missing = cut.rows[absent[cut.rows]]
        if len(missing):
            first = inventory.table["image_id"][int(missing[0])].as_py()
            budget.expect_missing(cut.name, int(np.size(missing)), f"{first}: no such file below {inventory.root}")
