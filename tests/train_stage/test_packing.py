"""Samples on ranks and in rows: nothing lost, nothing twice, work even."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train_stage.packing import CostModel, Packing, balance, pack

lengths_of = st.lists(st.integers(1, 500), min_size=1, max_size=60).map(lambda values: np.array(values, np.int64))


@given(lengths_of, st.integers(1, 9), st.integers(1, 600))
def test_every_sample_is_in_one_row_of_one_rank(lengths: np.ndarray, world: int, most_tokens: int) -> None:
    chosen = np.arange(len(lengths))[::-1].copy()
    costs = CostModel(0.01)(lengths)
    packing = Packing(lengths, costs, most_tokens)
    hands = [packing.rows(chosen, rank, world) for rank in range(world)]
    assert len({len(hand) for hand in hands}) == 1
    rows = [row for hand in hands for row in hand]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    for row in rows:
        assert lengths[row].sum() <= most_tokens or len(row) == 1


@given(lengths_of, st.integers(1, 600))
def test_rows_are_at_least_half_full_but_for_one(lengths: np.ndarray, most_tokens: int) -> None:
    sums = sorted(int(lengths[row].sum()) for row in pack(lengths, most_tokens))
    assert all(2 * total > most_tokens for total in sums[1:])


def busiest(where: np.ndarray, costs: np.ndarray, world: int) -> float:
    loads = np.bincount(where, costs, world)
    assert len(loads) == world
    assert loads.sum() == costs.sum()
    return float(loads.max())


@given(lengths_of, st.integers(1, 9))
def test_the_busiest_rank_is_never_busier_than_after_dealing_out_the_longest_first(
    lengths: np.ndarray, world: int
) -> None:
    costs = lengths.astype(np.float64)
    greedy = [0.0] * world
    for cost in sorted(costs.tolist(), reverse=True):
        greedy[greedy.index(min(greedy))] += cost
    assert busiest(balance(costs, world), costs, world) <= max(greedy)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=7), st.integers(1, 3))
def test_the_busiest_rank_is_at_most_a_third_busier_than_it_has_to_be(lengths: list[int], world: int) -> None:
    """Graham's bound for the longest first (SIAM J. Appl. Math. 17, 1969), against every way there is."""
    costs = np.array(lengths, np.float64)
    best = min(busiest(np.array(where), costs, world) for where in product(range(world), repeat=len(lengths)))
    assert 3 * world * busiest(balance(costs, world), costs, world) <= (4 * world - 1) * best


def test_work_is_even_at_32_ranks_and_128_samples_a_step() -> None:
    """Lengths as of LLaVA-1.5's mixture: 729 positions and a text, six samples in a hundred text only."""
    random = np.random.default_rng(0)
    cost = CostModel.of(layers=32, hidden_size=4096, layer_parameters=6_476_005_376)
    evenness = []
    for _ in range(100):
        text = np.clip(random.lognormal(5.3, 0.8, 128), 20, 1319)
        alone = np.clip(random.lognormal(6.5, 0.8, 128), 30, 2048)
        costs = cost(np.where(random.random(128) < 0.06, alone, 729 + text).astype(np.int64))
        loads = np.bincount(balance(costs, 32), costs, 32)
        evenness.append(loads.mean() / loads.max())
    assert np.mean(evenness) >= 0.94


def test_the_same_samples_whatever_the_world() -> None:
    lengths = np.arange(10, 74)
    chosen = np.arange(0, 64, 3)
    packing = Packing(lengths, lengths * 1.0, 128)
    seen = [
        sorted(np.concatenate([row for rank in range(world) for row in packing.rows(chosen, rank, world)]).tolist())
        for world in (1, 2, 5)
    ]
    assert seen[0] == seen[1] == seen[2] == chosen.tolist()
