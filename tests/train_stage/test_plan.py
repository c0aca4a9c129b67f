from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_stage.plan import epoch_order, make_plan


@given(
    samples=st.integers(1, 60),
    batch=st.integers(1, 20),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_epoch_sees_every_sample_once(samples: int, batch: int, seed: int) -> None:
    plan = make_plan(seed, samples, batch, epochs=2, max_steps=None)
    for epoch in range(2):
        seen: list[int] = []
        for position in range(plan.steps_per_epoch):
            step = epoch * plan.steps_per_epoch + position + 1
            assert plan.epoch_of(step) == epoch
            seen += plan.step_samples(step).tolist()
        assert sorted(seen) == list(range(samples))


def test_the_order_is_that_of_the_published_philox_stream() -> None:
    # Written down once: another NumPy or machine must give the same.
    assert epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(0, 1, 8).tolist() != epoch_order(0, 0, 8).tolist()
    assert epoch_order(1, 0, 8).tolist() != epoch_order(0, 0, 8).tolist()


def test_a_step_is_found_without_the_steps_before_it() -> None:
    plan = make_plan(7, 50, 8, epochs=3, max_steps=None)
    forward = [plan.step_samples(step).tolist() for step in range(1, plan.steps + 1)]
    backward = [plan.step_samples(step).tolist() for step in range(plan.steps, 0, -1)]
    assert forward == backward[::-1]


def test_the_last_step_of_an_epoch_holds_the_rest() -> None:
    plan = make_plan(0, 10, 4, epochs=1, max_steps=None)
    assert [len(plan.step_samples(step)) for step in (1, 2, 3)] == [4, 4, 2]


@pytest.mark.parametrize(("max_steps", "steps"), [(None, 6), (4, 4), (100, 6)])
def test_max_steps_ends_a_phase_early(max_steps: int | None, steps: int) -> None:
    assert make_plan(0, 10, 4, epochs=2, max_steps=max_steps).steps == steps
