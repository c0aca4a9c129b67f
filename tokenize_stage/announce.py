"""What a run says before it starts: what it will do and why, and the derived numbers."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from manifests.schema import FeaturesSpec
from manifests.shards import value_column
from tokenize_stage.output_folder import SOURCE_ERRORS_NAME
from tokenize_stage.planned import Planned
from tokenize_stage.sizes import image_bytes
from tokenize_stage.units import Changes

SHOWN_ERRORS = 5

_log = logging.getLogger(__name__)


def announce(planned: Planned) -> None:
    """Log the start-up block."""
    for line in plan_lines(planned):
        _log.info("%s", line)
    inventory = planned.inventory
    for error in inventory.errors[:SHOWN_ERRORS]:
        _log.warning("source row %d: %s", error.row, error.message)
    if len(inventory.errors) > SHOWN_ERRORS:
        more = len(inventory.errors) - SHOWN_ERRORS
        _log.warning("and %d more source errors, all in %s", more, SOURCE_ERRORS_NAME)


def plan_lines(planned: Planned) -> list[str]:
    """The plan in words: the source, what is to be done with which images and why, and what that comes to."""
    job, plan, inventory = planned.job, planned.plan, planned.inventory
    spec, units = job.spec, plan.units
    lines = [
        f"{inventory.images:,} images in {inventory.source.location} ({planned.listing.note or 'listed now'}), "
        f"{len(inventory.errors):,} source errors; {plan.unchanged:,} committed and unchanged"
    ]
    reasons = ", ".join(sorted(units.retry))
    lines += _changes("new", plan.new)
    lines += _changes("changed (another size or time), to be encoded again", plan.changed)
    lines += _changes("removed from the source, to be taken out", plan.removed)
    lines += _changes("in another file than before, to be copied", plan.moved)
    lines += _changes(f"rejected for {reasons}, to be tried again", plan.retried)
    if planned.stale:
        lines.append(
            f"{len(planned.stale):,} units of other settings or with a lost shard to be made anew: "
            f"{', '.join(planned.stale[:3])}{', ...' if len(planned.stale) > 3 else ''}"
        )
    rewritten = sum(cut.rewrites for cut in units.cuts)
    most = int(job.config.max_reject_rate * inventory.images)
    lines.append(
        f"{plan.encode:,} images to encode; {len(units):,} units of up to {job.unit_size:,} images to write"
        f"{f' ({rewritten:,} again, copying what is unchanged)' if rewritten else ''}, {job.config.engine} engine, "
        f"{spec.positions} positions x {spec.values} {value_column(spec).kind} a view, at most {most:,} rejects"
    )
    if len(units) and isinstance(spec, FeaturesSpec):
        lines.append(_features_size(planned, spec))
    return lines


def _changes(what: str, changes: Changes) -> list[str]:
    if not changes.count:
        return []
    more = ", ..." if changes.count > len(changes.examples) else ""
    return [f"{changes.count:,} {what}: {', '.join(changes.examples)}{more}"]


def _features_size(planned: Planned, spec: FeaturesSpec) -> str:
    job, images = planned.job, planned.plan.units.images
    each = image_bytes(spec, job.geometry)
    free = f"; {_free_bytes(job.store.location) / 1e9:,.2f} GB are free" if job.store.is_local else ""
    return (
        f"features in {spec.dtype} take {each / 1e6:.3f} MB an image, {each * images / 1e9:,.2f} GB for the {images:,} "
        f"images to do, before compression{free}"
    )


def _free_bytes(folder: str) -> int:
    """Of the disk that a folder is on, or will be."""
    place = Path(folder)
    return shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
