"""`engine: local`: one worker in this process. For small jobs and tests, and what the Ray engine must equal."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from itertools import islice

from tokenize_stage.engines.in_flight import InFlight, OnRunning, Running
from tokenize_stage.order import WorkOrder
from tokenize_stage.outcomes import UnitDone, UnitFailed
from tokenize_stage.threads import DaemonThreads
from tokenize_stage.units import Unit
from tokenize_stage.worker import UNITS_AT_ONCE, Worker

TELL_SECONDS = 0.2


def run_here(
    order: WorkOrder, units: Sequence[Unit], on_running: OnRunning
) -> Generator[UnitDone | UnitFailed, None, None]:
    """The outcomes of the units, in their order."""
    worker, in_flight = Worker(order), InFlight()
    threads = DaemonThreads(UNITS_AT_ONCE, "unit")

    def tokenize(unit: Unit) -> UnitDone | UnitFailed:
        try:
            return worker.tokenize(unit, in_flight.listener(unit.name))
        finally:
            in_flight.finish(unit.name)

    begun: deque[Future[UnitDone | UnitFailed]] = deque()
    waiting = iter(units)

    def begin(count: int) -> None:
        begun.extend(threads.submit(partial(tokenize, unit)) for unit in islice(waiting, count))

    try:
        begin(UNITS_AT_ONCE)
        while begun:
            while not wait([begun[0]], TELL_SECONDS).done:
                on_running(Running(1, in_flight.counts()))
            first = begun.popleft()
            begin(1)
            yield first.result()
    finally:
        worker.close()  # units in hand end at their next batch
        threads.close()
