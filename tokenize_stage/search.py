"""Residual nearest-vector search that equals a float64 oracle at the speed of one low-precision matrix product.

Shape legend: N features, n their width, D depths, K vectors of a codebook, M rows not settled by the fast pass.

**The oracle.** float32 features and codebooks are upcast to float64. At each depth the code is the
argmin over k of `squared_distance(r, c_k)`, ties to the lower id, and the residual becomes `r - c_code`;
every step is a float64 operation that IEEE 754 rounds on its own, in an order fixed by n alone, so the
oracle is one function on every device, batch shape and thread count.

**The fast search** brackets every candidate's score by one matrix product, in float32 on a CPU (`fast_pass`) and in
float16 on a GPU's tensor cores (`float16_pass`), keeps the candidates whose bracket reaches the best one's, and
decides among them with the oracle's own float64 arithmetic. The residual stays float64; only the product sees a
rounded copy. The bounds, and what they assume of the hardware, stand beside each pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from manifests.errors import InputError
from tokenize_stage.fast_pass import FastPass, Float32Pass
from tokenize_stage.float16_pass import WIDEST, Float16Pass, sums_in_float32

MAX_CANDIDATES = 32
"""A row with more candidates than this is decided against the whole codebook instead."""

SCORE_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
"""Size of a matrix of scores, by device: near the caches of a CPU, large enough to fill a GPU."""

_LEAST_ROWS = 512
"""A product of fewer rows spends its time on bringing a large codebook into cache: at K 16,384, width 1,152, a CPU does
128 rows at a time a fifth slower."""

_GROUP = 128
"""Columns whose minimum one pass over a matrix of scores keeps; see `_two_lowest`."""

_EXACT_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
_MAX_WIDTH = 1 << 20


class _Depth(NamedTuple):
    """One depth's codebook, equal rows merged: `ids_K` are the (lowest) ids the remaining rows stand for."""

    vectors_Kn: torch.Tensor
    """float32: upcasting what is used takes no room."""
    ids_K: torch.Tensor
    fast: FastPass


def chunk_rows(size: int, device: torch.device) -> int:
    """Rows whose scores against `size` codes are computed at once."""
    return min(max(SCORE_BYTES[device.type] // (4 * size), _LEAST_ROWS), 1 << 16)


def fast_pass(vectors_Kn: torch.Tensor) -> FastPass:
    """The pass for a codebook's device: float16 where there are tensor cores that sum in float32, else float32.

    `vectors_Kn`: float64 (K, n).
    """
    if vectors_Kn.is_cuda and vectors_Kn.shape[1] <= WIDEST and sums_in_float32(vectors_Kn.device):
        return Float16Pass(vectors_Kn)
    return Float32Pass(vectors_Kn)


class ResidualSearch:
    """Codebooks prepared once on a device, for many searches. Not for use by several threads at once."""

    def __init__(
        self,
        codebooks: Sequence[NDArray[np.float32]],
        device: torch.device | str = "cpu",
        make_pass: Callable[[torch.Tensor], FastPass] = fast_pass,
    ) -> None:
        """`codebooks`: D float32 arrays (K_d, n), n equal for all. `InputError` if one is empty or not finite.

        On a CPU their memory is used as it is: they must not change afterwards.
        """
        if not codebooks:
            raise ValueError("a residual search needs at least one codebook")
        self.device = torch.device(device)
        self.width = int(codebooks[0].shape[1])
        self.reranked_rows = 0
        """Rows, summed over depths, whose candidates were decided in float64."""
        self.fallback_rows = 0
        """Rows, summed over depths, that were decided against the whole codebook in float64."""
        self._depths = [self._prepare(depth, codebook, make_pass) for depth, codebook in enumerate(codebooks)]
        self._rows = chunk_rows(max(depth.vectors_Kn.shape[0] for depth in self._depths), self.device)
        # One buffer for all score matrices: allocating megabytes anew for each chunk costs as much as reading them.
        self._scratch = torch.empty(0, dtype=torch.float32, device=self.device)

    def __call__(self, features_Nn: torch.Tensor) -> torch.Tensor:
        """float32 (N, n) -> int32 (N, D) codes on the search's device, equal to `oracle` in every element.

        Working memory is bounded whatever N is. Raises `InputError` on NaN or infinity.
        """
        if features_Nn.dtype != torch.float32 or features_Nn.ndim != 2 or features_Nn.shape[1] != self.width:
            raise ValueError(f"features are float32 (N, {self.width}), not {features_Nn.dtype} {features_Nn.shape}")
        self._reserve(min(self._rows, len(features_Nn)))
        codes_ND = torch.empty(len(features_Nn), len(self._depths), dtype=torch.int32, device=self.device)
        for start in range(0, len(features_Nn), self._rows):
            rows = slice(start, start + self._rows)
            _refuse_non_finite(features_Nn[rows], "the features")
            residual_Nn = features_Nn[rows].to(self.device, torch.float64)  # from float32: always a copy
            for d, depth in enumerate(self._depths):
                best_N = self._nearest(residual_Nn, depth)
                codes_ND[rows, d] = depth.ids_K[best_N]
                if d + 1 < len(self._depths):
                    residual_Nn -= depth.vectors_Kn.index_select(0, best_N)
        return codes_ND

    def _prepare(
        self, depth: int, codebook: NDArray[np.float32], make_pass: Callable[[torch.Tensor], FastPass]
    ) -> _Depth:
        if codebook.ndim != 2 or codebook.dtype != np.float32 or not 0 < codebook.shape[1] < _MAX_WIDTH:
            raise ValueError(f"a codebook is float32 (K, n), not {codebook.dtype} {codebook.shape}")
        if codebook.shape[0] == 0 or codebook.shape[1] != self.width:
            raise InputError(f"the codebook of depth {depth} has shape {codebook.shape}, not (K, {self.width})")
        # Equal rows would all be candidates of each other; the lowest id wins among them by definition.
        first: dict[bytes, int] = {}
        for k, row in enumerate(codebook):
            first.setdefault(row.tobytes(), k)
        ids = torch.tensor(list(first.values()), dtype=torch.int64)
        vectors_Kn = torch.from_numpy(np.ascontiguousarray(codebook))
        if len(ids) < len(vectors_Kn):
            vectors_Kn = vectors_Kn[ids]
        vectors_Kn = vectors_Kn.to(self.device)
        _refuse_non_finite(vectors_Kn, f"the codebook of depth {depth}")
        return _Depth(vectors_Kn, ids.to(self.device, torch.int32), make_pass(vectors_Kn.double()))

    def _nearest(self, residual_Nn: torch.Tensor, depth: _Depth) -> torch.Tensor:
        """int64 (N,) row of `depth.vectors_Kn` the oracle would choose."""
        bracket = depth.fast.bracket(residual_Nn, self._scratch)
        lowest_N, best_N, second_N = _two_lowest(bracket.lower_NK)
        limit_N = _float32_above(lowest_N.double() + depth.fast.reach(bracket, best_N))
        # A row is settled when its second lowest bound is out of reach.
        open_ = ((second_N <= limit_N) | ~bracket.usable_N).nonzero()[:, 0]
        if len(open_):
            candidates_MK = bracket.lower_NK[open_] <= limit_N[open_, None]
            whole_M = ~bracket.usable_N[open_] | (candidates_MK.sum(1) > MAX_CANDIDATES)
            several, whole = open_[~whole_M], open_[whole_M]
            best_N[several] = _rerank(residual_Nn[several], depth.vectors_Kn, candidates_MK[~whole_M])
            best_N[whole] = nearest_exact(residual_Nn[whole], depth.vectors_Kn)
            self.reranked_rows += len(several)
            self.fallback_rows += len(whole)
        return best_N

    def _reserve(self, rows: int) -> None:
        needed = rows * max(depth.vectors_Kn.shape[0] for depth in self._depths)
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=torch.float32, device=self.device)


def residual_search(features_Nn: torch.Tensor, codebooks: Sequence[NDArray[np.float32]]) -> torch.Tensor:
    """One search on the features' device: float32 (N, n) and D x (K, n) -> int32 (N, D). See `ResidualSearch`."""
    return ResidualSearch(codebooks, features_Nn.device)(features_Nn)


def oracle(features_Nn: torch.Tensor, codebooks: Sequence[NDArray[np.float32]]) -> torch.Tensor:
    """The definition of the right answer, all in float64: float32 (N, n) and D x (K, n) -> int32 (N, D)."""
    residual_Nn = features_Nn.double()
    codes: list[torch.Tensor] = []
    for codebook in codebooks:
        vectors_Kn = torch.from_numpy(codebook).to(features_Nn.device, torch.float64)
        best_N = nearest_exact(residual_Nn, vectors_Kn)
        residual_Nn = residual_Nn - vectors_Kn[best_N]
        codes.append(best_N.int())
    return torch.stack(codes, 1)


def squared_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension of (x - y)^2, float64 in and out, broadcasting.

    The sum folds the upper half onto the lower until one term is left: elementwise operations only, so
    that a pair's value cannot depend on the shape it is computed in, as a library's reduction may.
    """
    terms = (x - y).square_()
    while (width := terms.shape[-1]) > 1:
        half = width // 2
        folded = terms[..., :half] + terms[..., half : 2 * half]
        if width % 2:
            folded[..., 0] += terms[..., -1]
        terms = folded
    return terms[..., 0]


def nearest_exact(residual_Nn: torch.Tensor, vectors_Kn: torch.Tensor) -> torch.Tensor:
    """argmin over k of the squared distance in float64, ties to the lower k.

    float64 (N, n), float32 or float64 (K, n) -> int64 (N,).
    """
    (count, width), size = residual_Nn.shape, vectors_Kn.shape[0]
    pairs = max(_EXACT_BYTES[residual_Nn.device.type] // (8 * width), 1)
    columns = min(size, pairs)
    rows = max(pairs // columns, 1)
    best_N = torch.zeros(count, dtype=torch.int64, device=residual_Nn.device)
    for row in _slices(count, rows):
        nearest = torch.full_like(residual_Nn[row, 0], math.inf)
        for column in _slices(size, columns):
            distance = squared_distance(residual_Nn[row, None], vectors_Kn[None, column])
            value, index = distance.min(1)  # of equal values the first, as torch promises
            closer = value < nearest
            nearest = torch.where(closer, value, nearest)
            best_N[row] = torch.where(closer, index + column.start, best_N[row])
    return best_N


def _rerank(residual_Nn: torch.Tensor, vectors_Kn: torch.Tensor, candidates_NK: torch.Tensor) -> torch.Tensor:
    """int64 (N,): the closest candidate of each row in float64, ties to the lower id; a row has at least one."""
    pair_row, pair_k = candidates_NK.nonzero().unbind(1)
    distance = torch.empty(len(pair_row), dtype=torch.float64, device=residual_Nn.device)
    step = max(_EXACT_BYTES[residual_Nn.device.type] // (8 * residual_Nn.shape[1]), 1)
    for part in _slices(len(pair_row), step):
        distance[part] = squared_distance(residual_Nn[pair_row[part]], vectors_Kn[pair_k[part]])
    nearest_N = distance.new_full((len(residual_Nn),), math.inf).scatter_reduce_(0, pair_row, distance, "amin")
    closest = distance == nearest_N[pair_row]
    best_N = pair_k.new_full((len(residual_Nn),), vectors_Kn.shape[0])
    return best_N.scatter_reduce_(0, pair_row[closest], pair_k[closest], "amin")


def _two_lowest(scores_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each row's lowest score, its column, and the lowest score of the other columns (inf if there is none), all (N,).

    One pass over the matrix keeps the minima of groups of columns; what is left looks at them and at one group a row.
    Torch's own minimum with its index, and a second pass for the runner-up, take three times as long on a CPU.
    """
    size = scores_NK.shape[1]
    group = min(_GROUP, size)
    even = size - size % group
    minima_Ng = scores_NK[:, :even].unflatten(1, (-1, group)).amin(2)
    if even < size:
        minima_Ng = torch.cat([minima_Ng, scores_NK[:, even:].amin(1, keepdim=True)], 1)
    lowest_N, group_N = minima_Ng.min(1)
    # The last columns are looked at with some before them, so that all groups are of one width.
    first_N = (group_N * group).clamp_(max=size - group)
    members_Ng = scores_NK.gather(1, first_N[:, None] + torch.arange(group, device=scores_NK.device))
    place_N = members_Ng.argmin(1)
    elsewhere_N = minima_Ng.scatter_(1, group_N[:, None], math.inf).amin(1)
    inside_N = members_Ng.scatter_(1, place_N[:, None], math.inf).amin(1)
    return lowest_N, first_N + place_N, torch.minimum(elsewhere_N, inside_N)


def _float32_above(x_N: torch.Tensor) -> torch.Tensor:
    """float32 values not below the float64 ones."""
    return (x_N + x_N.abs() * 2.0**-22).float()


def _slices(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _refuse_non_finite(values: torch.Tensor, what: str) -> None:
    # A sum with a term that is not finite is not finite either, and is ten times faster than to look at each.
    if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
        raise InputError(f"{what} hold NaN or infinity: check the encoder's weights, or use dtype float32")
