"""Is a stored code that comes out differently now the work of rounding, or plainly another code?

Shape legend: N positions, m width of a feature, D depths, n width of a code vector, K vectors of a codebook.

Another device, kernel or batch shape changes an encoder's features by rounding, and a code flips where two vectors are
almost equally near. Let t be what depth d quantises (the feature, less the vectors of the depths before; or the
feature's chunk d), c_s the stored code's vector and c_r the recomputed one's, the nearest to t. The stored code was the
nearest one to some t + delta only if delta moved t across the plane between the two, that is

    |delta| >= (|t - c_s|^2 - |t - c_r|^2) / (2 |c_s - c_r|)

The **shift** of a position is that bound divided by |feature| (|chunk|): by how much of its length the feature must
have been different. Up to `TOLERANCE` of the encoder's arithmetic it is a *flip*; above, a *mismatch*. All in float64 from
the recomputed float32 features. Only the first depth that differs says anything: after it the residuals are others.

A vector of unit length is nearest by distance exactly where its cosine is largest, and a sign is the nearest corner of a
cube, so the same bound serves all families.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from manifests.codebook import Codebooks
from tokenize_stage.config import ComputeDtype

TOLERANCE: dict[ComputeDtype, float] = {"float32": 2.0**-12, "bfloat16": 2.0**-4}
"""Shifts that rounding can explain. Measured on a CPU (2026-11-24, torch 2.13), a random Dinov2 of 24 layers, width 1,024, in
batches of 1, 2 and 4 and with 1 and 2 threads: features differ by at most 1.0e-6 of their length in float32 and 1.6e-2
in bfloat16. Allowed are 240 and 4 times that, for deeper encoders and other devices."""


class Shifts(NamedTuple):
    """For each differing position (M of N, `row_M`) its first differing depth and the shift that it takes."""

    row_M: npt.NDArray[np.int64]
    depth_M: npt.NDArray[np.int64]
    shift_M: npt.NDArray[np.float64]


def shifts(
    features_Nm: npt.NDArray[np.float32],
    stored_ND: npt.NDArray[Any],
    computed_ND: npt.NDArray[Any],
    codebooks: Codebooks,
    *,
    residual: bool,
) -> Shifts:
    """The shift of every position whose codes differ; infinite for a stored code that no codebook has.

    `computed_ND` are the exact codes of `features_Nm`; `codebooks`: D float32 arrays (K, n), with m = n if `residual`
    or D = 1, else m = D n.
    """
    differs_ND = stored_ND != computed_ND
    row_M = np.flatnonzero(differs_ND.any(axis=1))
    depth_M = differs_ND[row_M].argmax(axis=1)
    shift_M = np.empty(len(row_M), np.float64)
    for at, (row, depth) in enumerate(zip(row_M, depth_M, strict=True)):
        shift_M[at] = _shift(
            features_Nm[row].astype(np.float64),
            stored_ND[row],
            computed_ND[row],
            int(depth),
            codebooks,
            residual=residual,
        )
    return Shifts(row_M, depth_M, shift_M)


def _shift(
    feature_m: npt.NDArray[np.float64],
    stored_D: npt.NDArray[Any],
    computed_D: npt.NDArray[Any],
    depth: int,
    codebooks: Codebooks,
    *,
    residual: bool,
) -> float:
    book_Kn = codebooks[depth]
    if stored_D[depth] >= len(book_Kn):
        return float("inf")
    target_n = feature_m
    if residual:
        for before in range(depth):
            target_n = target_n - codebooks[before][computed_D[before]]
        scale = float(np.linalg.norm(feature_m))
    else:
        width = book_Kn.shape[1]
        target_n = feature_m[depth * width : (depth + 1) * width]
        scale = float(np.linalg.norm(target_n))
    stored_n, computed_n = (book_Kn[codes[depth]].astype(np.float64) for codes in (stored_D, computed_D))
    apart = float(np.linalg.norm(stored_n - computed_n))
    if apart == 0:
        return 0.0  # one vector under two ids
    excess = float(((target_n - stored_n) ** 2).sum() - ((target_n - computed_n) ** 2).sum())
    needed = max(excess, 0.0) / (2 * apart)
    return needed / scale if scale else float("inf") if needed else 0.0


def feature_shifts(stored_Nn: npt.NDArray[Any], computed_Nn: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The same for stored features: |stored - computed| / |computed| of each position, float64 (N,)."""
    computed = computed_Nn.astype(np.float64)
    apart_N = np.linalg.norm(stored_Nn.astype(np.float64) - computed, axis=1)
    scale_N = np.linalg.norm(computed, axis=1)
    shift_N: npt.NDArray[np.float64] = np.where(apart_N == 0, 0.0, apart_N / np.maximum(scale_N, np.finfo(float).tiny))
    return shift_N
