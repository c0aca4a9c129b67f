"""The micro-batches of each step; their samples are made in threads while the step before them runs."""

from __future__ import annotations

import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from manifests.errors import AsvrError
from train_stage.batch import Batch
from train_stage.collate import Collator, Document
from train_stage.packing import FixedRows, Packing
from train_stage.plan import Plan


@dataclass(frozen=True)
class Collected:
    """All micro-batches of one rank's step; or the error that kept one of them from being made."""

    step: int
    batches: list[Batch]
    error: AsvrError | None
    wait_seconds: float


def collect_steps(
    plan: Plan,
    packing: Packing | FixedRows,
    collator: Collator,
    *,
    first_step: int,
    rank: int,
    world: int,
    workers: int,
) -> Generator[Collected]:
    """The steps from `first_step` to the plan's last, the next one always in the making.

    `wait_seconds` is the time that the caller had to wait for a step.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="collate") as pool:

        def submit(step: int) -> list[list[Future[Document]]]:
            if step > plan.steps:
                return []
            rows = packing.rows(plan.step_samples(step), rank, world)
            return [[pool.submit(collator.document, index) for index in row.tolist()] for row in rows]

        try:
            ahead = submit(first_step)
            for step in range(first_step, plan.steps + 1):
                current, ahead = ahead, submit(step + 1)
                yield _wait(step, current, collator)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _wait(step: int, rows: list[list[Future[Document]]], collator: Collator) -> Collected:
    started = time.monotonic()
    batches: list[Batch] = []
    error: AsvrError | None = None
    for row in rows:
        try:
            batches.append(collator.join([future.result() for future in row]))
        except AsvrError as failure:
            error = error or failure
    return Collected(step, batches, error, time.monotonic() - started)
