"""How a step's samples are spread over ranks and packed into micro-batches: pure functions of lengths and world size.

Which samples a step holds is decided before, in `train_stage.plan`, whatever the number of ranks. Here they are given
to ranks so that all have about equally much to do, and each rank's samples become rows of at most so many tokens.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Costs = NDArray[np.float64]

_EXCHANGES = 1000


@dataclass(frozen=True)
class CostModel:
    """The work of a sample, in units of a token's work without attention: tokens + attention * tokens^2.

    `attention` is layers x hidden / parameters of the layers: a token's matrix multiplications take 2 FLOPs a parameter,
    its attention to half the sequence on average 4 x hidden x length / 2 a layer (Kaplan et al., arXiv 2001.08361).
    """

    attention: float

    @classmethod
    def of(cls, *, layers: int, hidden_size: int, layer_parameters: int) -> CostModel:
        """The model of a language model whose layers have `layer_parameters` parameters in all."""
        return cls(layers * hidden_size / layer_parameters)

    def __call__(self, lengths: Indices) -> Costs:
        tokens = lengths.astype(np.float64)
        return tokens * (1 + self.attention * tokens)


def balance(costs: Costs, world: int) -> Indices:
    """The rank of each sample, int64 (N,): the busiest rank has about as little to do as possible.

    The longest sample goes to the least busy rank, until all are placed; then samples are exchanged between the
    busiest rank and another (or moved to it) as long as that lowers the busier of the two. Deterministic.
    """
    where = np.empty(len(costs), dtype=np.int64)
    heap = [(0.0, rank) for rank in range(world)]
    for sample in np.argsort(-costs, kind="stable").tolist():
        load, rank = heapq.heappop(heap)
        where[sample] = rank
        heapq.heappush(heap, (load + float(costs[sample]), rank))
    return _exchange(costs, where, world) if world > 1 else where


def _exchange(costs: Costs, where: Indices, world: int) -> Indices:
    loads = np.bincount(where, costs, world)
    for _ in range(_EXCHANGES):
        busiest = int(loads.argmax())
        mine, others = np.flatnonzero(where == busiest), np.flatnonzero(where != busiest)
        # Partners of an exchange: each sample of another rank, and "nothing" of each rank.
        partner_costs = np.concatenate([costs[others], np.zeros(world)])
        partner_ranks = np.concatenate([where[others], np.arange(world)])
        given_MO = costs[mine][:, None] - partner_costs
        after_MO = np.maximum(loads[busiest] - given_MO, loads[partner_ranks] + given_MO)
        after_MO[:, partner_ranks == busiest] = np.inf
        own, partner = divmod(int(after_MO.argmin()), len(partner_costs))
        if after_MO[own, partner] >= loads[busiest] * (1 - 1e-9):
            return where
        other = int(partner_ranks[partner])
        where[mine[own]] = other
        if partner < len(others):
            where[others[partner]] = busiest
        loads[busiest] -= given_MO[own, partner]
        loads[other] += given_MO[own, partner]
    return where


def pack(lengths: Indices, most_tokens: int) -> list[Indices]:
    """Places of samples grouped into rows of at most `most_tokens` tokens: first fit, the longest first.

    A sample longer than that has a row of its own. The fullest rows come first, so that a phase which does not fit
    into memory fails at its first step.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        place = next((row for row, free in enumerate(room) if free >= length), None)
        if place is None:
            rows.append([sample])
            room.append(most_tokens - length)
        else:
            rows[place].append(sample)
            room[place] -= length
    order = sorted(range(len(rows)), key=lambda row: room[row])
    return [np.array(rows[row], dtype=np.int64) for row in order]


@dataclass(frozen=True)
class Packing:
    """How the samples of any step become rows: `lengths` and `costs` of all samples, by number, and the row's limit."""

    lengths: Indices
    costs: Costs
    most_tokens: int

    def rows(self, chosen: Indices, rank: int, world: int) -> list[Indices]:
        """The rows, numbers of samples each, that `rank` of `world` runs in a step whose samples are `chosen`.

        Every rank gets equally many, as the ZeRO stages need: those of length 0 are the fill.
        """
        where = balance(self.costs[chosen], world)
        hands = [self._pack(chosen[where == other]) for other in range(world)]
        return filled(hands, rank)

    def _pack(self, samples: Indices) -> list[Indices]:
        return [samples[places] for places in pack(self.lengths[samples], self.most_tokens)]


@dataclass(frozen=True)
class FixedRows:
    """Rows of `samples` samples, in the order of the step: the micro-batches of LLaVA's trainer, dealt out in turn."""

    samples: int

    def rows(self, chosen: Indices, rank: int, world: int) -> list[Indices]:
        """As `Packing.rows`."""
        rows = [chosen[start : start + self.samples] for start in range(0, len(chosen), self.samples)]
        return filled([rows[other::world] for other in range(world)], rank)


def filled(hands: list[list[Indices]], rank: int) -> list[Indices]:
    """A rank's hand, brought to the length of the longest with rows of no samples."""
    most = max(len(hand) for hand in hands)
    return hands[rank] + [np.empty(0, dtype=np.int64)] * (most - len(hands[rank]))
