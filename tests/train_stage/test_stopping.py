"""What ends a run early, and that all ranks hear of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import pytest

from train_stage.stopping import Stop, Stopper


class Together:
    """Two ranks, of which the other one brings these numbers."""

    def __init__(self, *other: float) -> None:
        self.other = other or (0, 0, 0)

    def sum(self, values: Sequence[float]) -> list[float]:
        return [a + b for a, b in zip(values, self.other, strict=True)]


def test_nothing_ends_a_run_that_has_no_limit() -> None:
    stopper = Stopper()
    assert [stopper.after_step(Together()) for _ in range(3)] == [None] * 3


def test_so_many_steps() -> None:
    stopper = Stopper(max_steps=2)
    assert stopper.after_step(Together()) is None
    assert stopper.after_step(Together()) == Stop("2 steps were asked for", 0)


def test_the_time_limit_ends_the_first_step_after_it() -> None:
    assert Stopper(minutes=1000).after_step(Together()) is None
    assert Stopper(minutes=0).after_step(Together()) == Stop("the time limit of 0 minutes is reached", 12)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_it_comes_in(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    stopper = Stopper()
    with stopper.listening():
        os.kill(os.getpid(), number)
        assert stopper.after_step(Together()) == Stop(f"{number.name} was received", code)
    assert signal.getsignal(number) is before


def test_a_signal_to_another_rank_counts() -> None:
    assert Stopper().after_step(Together(1, 0, 0)) == Stop("SIGTERM was received", 143)
