"""Codebooks from a sample of features by mini-batch k-means: residual, or one for each chunk of a feature.

Shape legend: N sampled features, n their width, B a mini-batch, D depths, K vectors of a codebook.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from manifests.errors import InputError
from tokenize_stage.codebook_folder import DepthReport
from tokenize_stage.search import SCORE_BYTES, ResidualSearch

_CHECKS = 10
"""A fit from new points looks for dead codes at least this many times, if it has as many steps."""
_ROWS = 1 << 16

Sample = npt.NDArray[np.float32]
"""Features (N, n), or a codebook (K, n)."""

OnStep = Callable[[int, int], None]
"""Told the depth, counted from 0, and the steps done in it."""


def fit_residual(
    sample_Nn: Sample,
    *,
    depth: int,
    size: int,
    iterations: int,
    minibatch: int,
    seed: int,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    start: Sequence[Sample] | None = None,
) -> tuple[list[Sample], list[DepthReport]]:
    """Learn D codebooks, float32 (K, n), and report each depth on the sample itself.

    `sample_Nn` is used up: it holds the last residuals afterwards, so that one sample's memory is enough.
    The same arguments give the same codebooks on the same machine and torch. Depth d is fitted to residuals taken with
    the exact search, the ones tokenization will see. `start`: D codebooks (K, n) to go on from, instead of points
    drawn from the sample. Raises `InputError` if N < K, or on NaN or infinity.
    """
    _check(sample_Nn, size)
    energy = _energy(sample_Nn, _mean(sample_Nn))
    steps = _Steps(
        iterations, min(minibatch, len(sample_Nn)), torch.Generator().manual_seed(seed), torch.device(device)
    )
    codebooks: list[Sample] = []
    reports: list[DepthReport] = []
    for d in range(depth):
        codebook_Kn = _fit_depth(sample_Nn, size, steps, _told(on_step, d), start[d] if start else None)
        wins_K = _quantise(sample_Nn, codebook_Kn, device)
        codebooks.append(codebook_Kn)
        reports.append(_report(wins_K, _energy(sample_Nn, np.zeros(sample_Nn.shape[1])), energy))
    return codebooks, reports


def fit_product(
    sample_Nm: Sample,
    *,
    depth: int,
    size: int,
    iterations: int,
    minibatch: int,
    seed: int,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    start: Sequence[Sample] | None = None,
) -> tuple[list[Sample], list[DepthReport]]:
    """Learn D independent codebooks, float32 (K, n), one for each of D chunks, n wide, of features m = D n wide.

    As `fit_residual` otherwise, but the sample is left as it is. `ValueError` if D does not divide m.
    """
    _check(sample_Nm, size)
    if sample_Nm.shape[1] % depth:
        raise ValueError(f"features {sample_Nm.shape[1]} wide are not cut into {depth} equal chunks")
    energies = [_energy(chunk_Nn, _mean(chunk_Nn)) for chunk_Nn in np.split(sample_Nm, depth, 1)]
    left = energy = math.fsum(energies)
    steps = _Steps(
        iterations, min(minibatch, len(sample_Nm)), torch.Generator().manual_seed(seed), torch.device(device)
    )
    codebooks: list[Sample] = []
    reports: list[DepthReport] = []
    for d, view_Nn in enumerate(np.split(sample_Nm, depth, 1)):
        chunk_Nn = np.array(view_Nn, order="C")
        codebook_Kn = _fit_depth(chunk_Nn, size, steps, _told(on_step, d), start[d] if start else None)
        wins_K = _quantise(chunk_Nn, codebook_Kn, device)
        left += _energy(chunk_Nn, np.zeros(chunk_Nn.shape[1])) - energies[d]
        codebooks.append(codebook_Kn)
        reports.append(_report(wins_K, max(left, 0.0), energy))
    return codebooks, reports


def perplexity(wins_K: npt.NDArray[np.int64]) -> float:
    """exp of the entropy of the code distribution; 0 if there are no codes at all."""
    total = wins_K.sum()
    if not total:
        return 0.0
    share = wins_K[wins_K > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


class _Steps(NamedTuple):
    """How a depth is learnt."""

    iterations: int
    minibatch: int
    generator: torch.Generator
    device: torch.device


def _check(sample_Nn: Sample, size: int) -> None:
    if len(sample_Nn) < size:
        raise InputError(
            f"{len(sample_Nn)} positions are too few for codebooks of {size} vectors: add images or make size smaller"
        )
    if not np.isfinite(sample_Nn).all():
        raise InputError("the features hold NaN or infinity: check the encoder's weights, or use dtype float32")


def _told(on_step: OnStep | None, depth: int) -> Callable[[int], None] | None:
    return partial(on_step, depth) if on_step else None


def _report(wins_K: npt.NDArray[np.int64], error: float, energy: float) -> DepthReport:
    return DepthReport(
        used=int((wins_K > 0).sum()),
        perplexity=perplexity(wins_K),
        relative_error=error / energy if energy else 0.0,
    )


def _fit_depth(
    sample_Nn: Sample, size: int, steps: _Steps, on_step: Callable[[int], None] | None, start_Kn: Sample | None
) -> Sample:
    """Mini-batch k-means: each centre is the mean of the points it won, weights fading over about one pass.

    With weight w_k and, in a step, n_k points of sum s_k: `w_k <- f w_k + n_k; c_k <- c_k + (s_k - n_k c_k) / w_k`,
    f = 1 - B / N, which is Lloyd's algorithm when a mini-batch is the whole sample (after Sculley, Web-scale k-means
    clustering, 2010, whose f is 1). A code that won nothing since the last look is dead and moves onto
    a point drawn with probability proportional to its squared error. A codebook to go on from gets the weights it would
    have after a pass, the points it wins, so that the first batches move it little; which of its codes are dead is
    then known at once, and looked up again once a pass: a shorter look would take rare codes for dead ones.
    """
    iterations, minibatch, generator, device = steps
    # Distances are taken about the mean: a shared offset would cost float32 its digits.
    mean_n = torch.from_numpy(_mean(sample_Nn)).float()
    first_Kn = _distinct_rows(sample_Nn, size, generator) if start_Kn is None else start_Kn.copy()
    centre_Kn = (torch.from_numpy(first_Kn) - mean_n).to(device)
    mean_n = mean_n.to(device)
    wins_K = torch.zeros(size, dtype=torch.int64, device=device)
    if start_Kn is not None:
        wins_K += _wins(sample_Nn, mean_n, centre_Kn)
    weight_K = wins_K.float()
    keep = 1 - minibatch / len(sample_Nn)
    passes = math.ceil(len(sample_Nn) / minibatch)
    interval = max(1, min(passes, iterations // _CHECKS)) if start_Kn is None else passes
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, iterations + 1):
        if len(order) < minibatch:
            order = torch.cat([order, torch.randperm(len(sample_Nn), generator=generator)])
        batch, order = order[:minibatch], order[minibatch:]
        points_Bn = torch.from_numpy(sample_Nn[batch.numpy()]).to(device) - mean_n
        score_B, code_B = _assign(points_Bn, centre_Kn)
        won_K = torch.bincount(code_B, minlength=size)
        weight_K = weight_K * keep + won_K
        shift_Kn = _sums(points_Bn, code_B, won_K) - won_K[:, None] * centre_Kn
        centre_Kn += shift_Kn / weight_K.clamp(min=1)[:, None]
        wins_K += won_K
        counted = step == 1 and start_Kn is not None
        if counted or (step % interval == 0 and step + interval <= iterations):
            error_B = (points_Bn.square().sum(1) + 2 * score_B).clamp(min=0)
            _revive(centre_Kn, weight_K, wins_K, points_Bn, error_B, generator)
            wins_K.zero_()
        if on_step:
            on_step(step)
    return np.ascontiguousarray((centre_Kn + mean_n).cpu().numpy())


def _wins(sample_Nn: Sample, mean_n: torch.Tensor, centre_Kn: torch.Tensor) -> torch.Tensor:
    """How many points of the whole sample each centre wins, int64 (K,)."""
    wins_K = torch.zeros(len(centre_Kn), dtype=torch.int64, device=centre_Kn.device)
    for start in range(0, len(sample_Nn), _ROWS):
        points_Mn = torch.from_numpy(sample_Nn[start : start + _ROWS]).to(centre_Kn.device) - mean_n
        wins_K += torch.bincount(_assign(points_Mn, centre_Kn)[1], minlength=len(centre_Kn))
    return wins_K


def _assign(points_Bn: torch.Tensor, centre_Kn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centre of each point, int64 (B,), and its score |c|^2 / 2 - x.c; plain float32 will do for learning."""
    half_K = centre_Kn.square().sum(1) / 2
    rows = max(64, SCORE_BYTES[points_Bn.device.type] // (4 * len(centre_Kn)))
    parts = [torch.addmm(half_K, part, centre_Kn.T, alpha=-1).min(1) for part in points_Bn.split(rows)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _revive(
    centre_Kn: torch.Tensor,
    weight_K: torch.Tensor,
    wins_K: torch.Tensor,
    points_Bn: torch.Tensor,
    error_B: torch.Tensor,
    generator: torch.Generator,
) -> None:
    """Move dead codes, in place, onto badly reconstructed points; weightless, they follow what they win next."""
    dead = (wins_K == 0).nonzero()[:, 0]
    chance_B = error_B.double().cpu()
    count = min(len(dead), int((chance_B > 0).sum()))
    if count:
        drawn = torch.multinomial(chance_B, count, generator=generator).to(points_Bn.device)
        centre_Kn[dead[:count]] = points_Bn[drawn]
        weight_K[dead[:count]] = 0


def _sums(points_Bn: torch.Tensor, code_B: torch.Tensor, won_K: torch.Tensor) -> torch.Tensor:
    """Sum of the points of each code, (K, n): sorted first, so that a GPU adds them in one order every time."""
    order = torch.argsort(code_B, stable=True)
    return torch.segment_reduce(points_Bn[order], "sum", lengths=won_K, axis=0, unsafe=True, initial=0)


def _distinct_rows(sample_Nn: Sample, size: int, generator: torch.Generator) -> Sample:
    """`size` rows drawn without replacement, of different values as far as the sample has them."""
    order = torch.randperm(len(sample_Nn), generator=generator).numpy()
    first: dict[bytes, int] = {}
    for row in order:
        first.setdefault(sample_Nn[row].tobytes(), row)
        if len(first) == size:
            break
    rows = list(first.values())
    rows += [rows[i % len(rows)] for i in range(size - len(rows))]
    return sample_Nn[rows]


def _quantise(residual_Nn: Sample, codebook_Kn: Sample, device: torch.device | str) -> npt.NDArray[np.int64]:
    """Subtract from each row, in place, its nearest vector; returns how many rows each vector won."""
    search = ResidualSearch([codebook_Kn], device)
    wins_K = np.zeros(len(codebook_Kn), np.int64)
    for start in range(0, len(residual_Nn), _ROWS):
        rows = residual_Nn[start : start + _ROWS]
        codes = search(torch.from_numpy(rows))[:, 0].cpu().numpy()
        rows -= codebook_Kn[codes]
        wins_K += np.bincount(codes, minlength=len(codebook_Kn))
    return wins_K


def _mean(sample_Nn: Sample) -> npt.NDArray[np.float64]:
    return np.asarray(sample_Nn.mean(0, dtype=np.float64))


def _energy(sample_Nn: Sample, about_n: npt.NDArray[np.float64]) -> float:
    """Sum of the squared distances from `about_n`, in float64, without a float64 copy of the sample."""
    starts = range(0, len(sample_Nn), _ROWS)
    return math.fsum(float(np.square(sample_Nn[start : start + _ROWS] - about_n).sum()) for start in starts)
