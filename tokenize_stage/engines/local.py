"""`engine: local`: one worker in this process. For small jobs and tests, and what the Ray engine must equal."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from tokenize_stage.outcomes import UnitDone, UnitFailed
from tokenize_stage.units import Unit
from tokenize_stage.worker import OnImages, Worker, WorkOrder


def run_here(
    order: WorkOrder, units: Sequence[Unit], on_images: OnImages
) -> Generator[UnitDone | UnitFailed, None, None]:
    """The outcomes of the units, in their order."""
    worker = Worker(order)
    try:
        for unit in units:
            yield worker.tokenize(unit, on_images)
    finally:
        worker.close()
