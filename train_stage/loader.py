"""The micro-batches of each step, made in threads while the step before them runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from manifests.errors import AsvrError
from train_stage.batch import Batch
from train_stage.plan import Indices, Plan


@dataclass(frozen=True)
class Collected:
    """All micro-batches of one rank's step; or the error that kept one of them from being made."""

    step: int
    batches: list[Batch]
    error: AsvrError | None
    wait_seconds: float


def collect_steps(
    plan: Plan,
    lengths: Indices,
    collate: Callable[[Indices], Batch],
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

        def submit(step: int) -> list[Future[Batch]]:
            if step > plan.steps:
                return []
            return [pool.submit(collate, indices) for indices in plan.micro_batches(step, lengths, rank, world)]

        try:
            ahead = submit(first_step)
            for step in range(first_step, plan.steps + 1):
                current, ahead = ahead, submit(step + 1)
                yield _wait(step, current)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _wait(step: int, futures: list[Future[Batch]]) -> Collected:
    started = time.monotonic()
    batches: list[Batch] = []
    error: AsvrError | None = None
    for future in futures:
        try:
            batches.append(future.result())
        except AsvrError as failure:
            error = error or failure
    return Collected(step, batches, error, time.monotonic() - started)
