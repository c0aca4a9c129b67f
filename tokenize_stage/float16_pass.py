"""The fast pass of a GPU: one float16 product with float32 sums, on tensor cores, and its bound.

Shape legend: N features, n their width, K vectors of a codebook; m = n + 4 columns of the product.

**Operands.** a, b_k, A, C_k, h_k and S_k = h_k - a.b_k as in `fast_pass`, but in a unit that makes the largest
|b_k| between 64 and 128, so that float16 has room below. [x] is x rounded to float16, with results below 2^-14
(its subnormals, which some hardware flushes) set to zero. What rounding lost is measured, not assumed:
`e >= |a - [a]|` for each row, `f_k >= |b_k - [b_k]|` for each code. By Cauchy-Schwarz

    |a.b_k - [a].[b_k]| = |(a - [a]).b_k + [a].(b_k - [b_k])| <= e C_k + A+ f_k

where x+ is a float16 not below x, and A+ also not below |[a]|, nor C+_k below |[b_k]|.

**Sums.** Let the hardware return a sum of m exact products off by at most omega T, T the sum of their magnitudes and
omega = m 2^-22. The product has the columns

    row  -[a]    -e+    -A+    1      1
    code  [b_k]   C+_k   g+_k  h1_k   h2_k       with g_k = f_k + 1.25 omega C+_k

and h1 + h2, two float16s, `d_k = h_k - h1_k - h2_k >= 1.25 omega h_k + 2^-14`. The exact sum of its terms thus lies
below S_k by at least omega (1.25 h_k + 1.25 A+ C+_k) + 2^-14. Since e+ <= A+ / 16 and g+ <= C+ / 16 by
construction, T <= (1 + 2^-10) h_k + 2^-11 + 1.125 A+ C+_k, of which omega is less than that: what the product
returns is a lower bound. With margin_k = d_k + e+ C+_k + A+ g+_k, the exact sum lies within margin_k of [a].[b_k]'s
score, and both errors together are at most margin_k again:

    lower_k <= S_k <= lower_k + 2 margin_k

so with j = argmin lower the oracle's choice is among `lower_k <= lower_j + 2 margin_j + theta (A + C_j)^2`. The float32
and float64 arithmetic that made the operands is covered by 2^-22 A, 2^-30 C_k and 2^-20 added to e and f, and by 2^-8 A
added to A. Rows with A > 2^15 would not fit: they are not usable.

**What it assumes of the hardware**: omega. A product of two normal float16s is exact in float32. Summing m numbers in
any order in IEEE float32 costs at most m 2^-24 T (1 + m 2^-24). Tensor cores add a block of p >= 4 products and the
accumulator at once: every addend is truncated to a multiple of 2^-23 times the power of two of the largest one, and
the sum truncated to 24 bits, so a block costs at most (p + 1) 2^-23 T, all m / p of them 1.25 m 2^-23 T < 0.63 omega T
(after Fasi, Higham,
Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor cores, 2021, for V100, T4 and A100; Khattak, Mikaitis,
Accurate models of NVIDIA tensor cores, 2025, go on to H100 and B200. NVIDIA documents none of it). The result leaves in
float32. Not covered are sums in float16, which are switched off around the product, and the 14-bit
accumulators that some of these GPUs have for float8; `sums_in_float32` tries a device before it is trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from tokenize_stage.fast_pass import ORACLE_ROUNDING, Bracket, norms

WIDEST = 1 << 15
"""Largest n: beyond it omega is no longer small."""

_ALIGNMENT = 8
"""Columns come in multiples of 16 bytes, which tensor cores want."""
_LARGEST_NORM = 2.0**15
_SMALLEST_NORMAL = 2.0**-14
_SETTINGS = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")


Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Of float16 (N, m) and (m, K), into float32 (N, K)."""


class Float16Pass:
    """See `fast_pass.FastPass`. On a CPU it computes the same in float32, slowly: for tests of the bound."""

    def __init__(self, codebook_Kn: torch.Tensor) -> None:
        """`codebook_Kn`: float64 (K, n), n at most `WIDEST`."""
        size, self._width = codebook_Kn.shape
        if self._width > WIDEST:
            raise ValueError(f"a float16 pass takes vectors up to {WIDEST} wide, not {self._width}")
        self.omega = (self._width + 4) * 2.0**-22
        mean_n = codebook_Kn.mean(0)
        centred = codebook_Kn - mean_n
        largest = float(norms(centred).max())
        self.scale = 2.0 ** (7 - math.frexp(largest)[1]) if largest > 0 else 1.0
        self._offset_n = mean_n * -self.scale
        vectors_Kn = centred * self.scale
        half_Kn = _float16(vectors_Kn)
        self._norm_K = norms(vectors_Kn)
        half_norm_K = self._norm_K.square() / 2
        lost_K = norms(vectors_Kn - half_Kn.double()) + 2.0**-30 * self._norm_K + 2.0**-20
        above_K = torch.maximum(self._norm_K * (1 + 2.0**-10), 32 * lost_K).clamp(min=2.0**-10)
        self._norm_above_K = _float16_above(above_K)
        self._loss_above_K = _float16_above(lost_K + 1.25 * self.omega * self._norm_above_K.double())
        target_K = (1 - 1.25 * self.omega - 2.0**-20) * half_norm_K - 2.0**-12
        first_K = _float16(target_K)
        second_K = _float16(target_K - first_K.double())
        self._deficit_K = half_norm_K - first_K.double() - second_K.double()
        columns = -(-(self._width + 4) // _ALIGNMENT) * _ALIGNMENT
        self._vectors_Km = half_Kn.new_zeros(size, columns)
        self._vectors_Km[:, : self._width] = half_Kn
        tail = torch.stack([self._norm_above_K, self._loss_above_K, first_K, second_K], 1)
        self._vectors_Km[:, self._width : self._width + 4] = tail

    def bracket(self, residual_Nn: torch.Tensor, scratch: torch.Tensor) -> Bracket:
        """Lower bounds of every score: one product of float16 (N, m) and (m, K) into float32."""
        # Scaling by a power of two is exact, so this rounds once: s r - s mu.
        a_Nn = torch.add(self._offset_n, residual_Nn, alpha=self.scale).float()
        norm_N = torch.linalg.vector_norm(a_Nn, dim=1) * (1 + 2.0**-8)
        usable_N = norm_N <= _LARGEST_NORM
        a_Nn.masked_fill_(~usable_N[:, None], 0.0)
        norm_N = torch.where(usable_N, norm_N, 0.0)
        half_Nn = _float16(a_Nn)
        lost_N = torch.linalg.vector_norm(a_Nn.sub_(half_Nn), dim=1) * (1 + 2.0**-8) + 2.0**-22 * norm_N + 2.0**-20
        loss_above_N = _float16_above(lost_N)
        norm_above_N = _float16_above(torch.maximum(norm_N, 16 * loss_above_N.float()))
        rows_Nm = half_Nn.new_zeros(len(half_Nn), self._vectors_Km.shape[1])
        torch.neg(half_Nn, out=rows_Nm[:, : self._width])
        rows_Nm[:, self._width] = -loss_above_N
        rows_Nm[:, self._width + 1] = -norm_above_N
        rows_Nm[:, self._width + 2 : self._width + 4] = 1.0
        lower_NK = scratch[: len(rows_Nm) * len(self._vectors_Km)].view(len(rows_Nm), -1)
        self.multiply(rows_Nm, self._vectors_Km.T, lower_NK)
        return Bracket(lower_NK, norm_above_N.double(), loss_above_N.double(), usable_N)

    def reach(self, bracket: Bracket, best_N: torch.Tensor) -> torch.Tensor:
        """2 margin_j + theta (A + C_j)^2, float64 (N,)."""
        rounding_N = ORACLE_ROUNDING * (bracket.norm_N + self._norm_K[best_N]).square()
        return 2 * self.margin(bracket, best_N) + rounding_N

    def margin(self, bracket: Bracket, k_N: torch.Tensor) -> torch.Tensor:
        """float64, broadcasting: the score of code k lies between `lower_k` and `lower_k` plus twice this."""
        lost = bracket.lost_N * self._norm_above_K[k_N].double() + bracket.norm_N * self._loss_above_K[k_N].double()
        return self._deficit_K[k_N] + lost

    @staticmethod
    def multiply(rows_Nm: torch.Tensor, vectors_mK: torch.Tensor, out_NK: torch.Tensor) -> None:
        """float16 times float16 into float32, off by at most omega times the sum of the terms' magnitudes."""
        if rows_Nm.is_cuda:
            with _float32_sums():
                torch.mm(rows_Nm, vectors_mK, out_dtype=torch.float32, out=out_NK)
        else:
            torch.mm(rows_Nm.float(), vectors_mK.float(), out=out_NK)


@cache
def sums_in_float32(device: torch.device, multiply: Multiply = Float16Pass.multiply) -> bool:
    """Whether the device's float16 products sum as the bound assumes, on terms that narrower sums would lose.

    1 + 1,023 / 2^15, term by term: a sum kept to 14 bits or less stays near 1.
    """
    terms = 1024
    row_m = torch.full((terms,), 2.0**-7, dtype=torch.float16, device=device)
    row_m[0] = 1.0
    vector_m = torch.full_like(row_m, 2.0**-8)
    vector_m[0] = 1.0
    sums = torch.empty(128, 128, dtype=torch.float32, device=device)
    multiply(row_m.repeat(128, 1), vector_m.repeat(128, 1).T, sums)
    exact = 1 + (terms - 1) * 2.0**-15
    return bool(((sums - exact).abs() <= terms * 2.0**-22 * exact).all())


@contextmanager
def _float32_sums() -> Iterator[None]:
    """Sums of float16 products in float32 throughout; both settings belong to the process, so they are put back."""
    matmul = torch.backends.cuda.matmul
    on = [name for name in _SETTINGS if getattr(matmul, name)]
    for name in on:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name in on:
            setattr(matmul, name, True)


def _float16(x: torch.Tensor) -> torch.Tensor:
    """[x]: the nearest float16, subnormals as zero."""
    half = x.half()
    return half.masked_fill_(half.abs() < _SMALLEST_NORMAL, 0.0)


def _float16_above(x: torch.Tensor) -> torch.Tensor:
    """x+: normal float16s not below the non-negative x, and hardly above it."""
    return (x * (1 + 2.0**-10)).clamp(min=_SMALLEST_NORMAL).half()
