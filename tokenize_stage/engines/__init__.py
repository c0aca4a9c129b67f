"""Engines schedule units over workers and hand back outcomes as they finish; they decide nothing else.

`local` runs one worker in this process, `ray` a pool of actors on a cluster. The same units give the same bytes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from tokenize_stage.config import RayConfig
from tokenize_stage.engines.in_flight import OnRunning
from tokenize_stage.order import WorkOrder
from tokenize_stage.outcomes import UnitDone, UnitFailed
from tokenize_stage.units import Unit


def run_units(
    order: WorkOrder, units: Sequence[Unit], *, ray: RayConfig | None, on_running: OnRunning
) -> Generator[UnitDone | UnitFailed, None, None]:
    """The outcome of every unit, in any order; with `ray` on a cluster, else in this process.

    `on_running` hears between the outcomes how far the unfinished units are. Closing the iterator stops the workers.
    """
    if ray is not None:
        from tokenize_stage.engines.ray import run_on_ray

        return run_on_ray(order, units, ray, on_running)
    from tokenize_stage.engines.local import run_here

    return run_here(order, units, on_running)
