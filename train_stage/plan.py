"""Which samples a step trains on: a pure function of (seed, epoch, step), whatever the number of ranks.

Resuming at a step needs nothing but its number. How the samples of a step are spread over ranks and rows is decided
afterwards, in `train_stage.packing`.

The last step of an epoch holds what is left over, so it may be smaller: nothing is dropped and nothing is
seen twice in an epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """The order of a phase: `samples` samples in steps of `batch_size`, for `steps` steps."""

    seed: int
    samples: int
    batch_size: int
    steps: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    def epoch_of(self, step: int) -> int:
        """Epoch, counted from 0, of a step, counted from 1."""
        return (step - 1) // self.steps_per_epoch

    def step_samples(self, step: int) -> Indices:
        """Indices of the samples of a step (counted from 1), in the order of the epoch; int64, at most batch_size."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, self.samples)
        return order[position * self.batch_size : (position + 1) * self.batch_size]


def make_plan(seed: int, samples: int, batch_size: int, epochs: int, max_steps: int | None) -> Plan:
    """The plan of a phase: `epochs` passes over the samples, ended early by `max_steps`."""
    steps = math.ceil(samples / batch_size) * epochs
    return Plan(seed, samples, batch_size, steps if max_steps is None else min(steps, max_steps))


_last: tuple[tuple[int, int, int], Indices] | None = None


def epoch_order(seed: int, epoch: int, samples: int) -> Indices:
    """The permutation of an epoch, int64 (samples,): sample i stands where the i-th raw Philox number sorts.

    Philox is counter-based and its raw stream, keyed by (seed, epoch), is the same in every NumPy version
    and on every machine; `Generator.permutation` promises neither.
    """
    global _last
    key = (seed, epoch, samples)
    if _last is None or _last[0] != key:
        raw = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(samples)
        order = np.argsort(raw, kind="stable").astype(np.int64)
        order.flags.writeable = False
        _last = (key, order)
    return _last[1]
