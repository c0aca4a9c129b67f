"""What a fast, inexact pass over a codebook must promise, and the one in float32.

Shape legend: N features, n their width, K vectors of a codebook; m columns of the product.

A pass brackets the scores of all K codes for each row, cheaply, and says how far above the lowest bound the right
code's may lie. `search` decides among the candidates in float64, so a pass can cost time but never a code, as
long as its bound holds. `Float32Pass` is bounded here; `float16_pass` does the same for the tensor cores of a GPU.

**The bound.** Let mu be the codebook's mean and s a power of two with `s * max_k |c_k - mu| <= 1`; a = s(r - mu),
b_k = s(c_k - mu), A = |a|, C_k = |b_k|, h_k = C_k^2 / 2. Then `S_k = h_k - a.b_k = (s^2 |r - c_k|^2 - A^2) / 2` orders
the codes as the distance does, and centring keeps A and C_k small when the features share an offset.
With u = 2^-24 and gamma_m = m u / (1 - m u): a float32 inner product of n + 1 terms plus one addend, in any
order and with or without fused multiply-add, is off by at most gamma_{n+2} times the sum of the magnitudes of its terms
(Higham, Accuracy and Stability of Numerical Algorithms, 3.1); rounding the two inputs and h to float32 adds 3, the
float64 arithmetic that made them (errors below 2^-30 for n < 2^20) less than 1 more. Hence, by Cauchy-Schwarz,
the computed score is within `eps1 (h_k + A C_k) + tau` of S_k, with eps1 = gamma_{n+8} and
tau = (n + 8) 2^-126 (2 + A) for every underflow, flushed to zero or not. The product carries one extra column, A times
eps C_k, and (1 - eps) h_k as its addend, so what it returns is already a lower bound; the terms then add up to
(1 + eps) (h_k + A C_k) at most, and eps = eps1 / (1 - eps1) is what solves eps = eps1 (1 + eps):
`lower_k <= S_k + tau` and `S_k <= lower_k + 2 eps (h_k + A C_k) + tau`.
The oracle's own rounding can prefer k* to j only if `S_k* <= S_j + theta (A + C_j)^2`, theta = 2^-46. So with
j = argmin lower, the oracle's choice is among `lower_k <= lower_j + 2 eps (h_j + A C_j) + 2 tau + theta (A + C_j)^2`.

**What it assumes of the hardware**: each float32 multiplication and addition rounds with relative error at most 2^-24
(true of IEEE float32 on CPUs and CUDA cores; TF32 and bfloat16 substitutes are refused, see `require_full_float32`),
and no Strassen-like algorithm.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch

from manifests.errors import EnvironmentProblem

ORACLE_ROUNDING = 2.0**-46
"""theta: the oracle's own rounding prefers k* to j only if S_k* <= S_j + theta (A + C_j)^2, for n < 2^20."""

_LARGEST_NORM = 2.0**60
_FLOAT64_SAFETY = 1 + 2.0**-30


class Bracket(NamedTuple):
    """What a fast pass knows of the scores S_k of each row, in the scaled units of the module's docstring."""

    lower_NK: torch.Tensor
    """float32; lower bounds of the S_k, up to what `reach` adds."""
    norm_N: torch.Tensor
    """float64; at least A."""
    lost_N: torch.Tensor
    """float64; what rounding the row to the product's operands lost, for passes that measure it (else 0)."""
    usable_N: torch.Tensor
    """bool; False where the row is out of the pass's range and its bracket means nothing."""


class FastPass(Protocol):
    """A low-precision pass over one codebook, with a bound that holds for every row it calls usable."""

    def bracket(self, residual_Nn: torch.Tensor, scratch: torch.Tensor) -> Bracket:
        """Scores of float64 (N, n) residuals; `scratch` is float32, at least N x K, and holds `lower_NK` afterwards."""
        ...

    def reach(self, bracket: Bracket, best_N: torch.Tensor) -> torch.Tensor:
        """float64 (N,): how far above `lower[best]` the lower bound of the oracle's choice can lie."""
        ...


class Float32Pass:
    """The pass whose bound the module's docstring derives."""

    def __init__(self, codebook_Kn: torch.Tensor) -> None:
        """`codebook_Kn`: float64 (K, n)."""
        require_full_float32()
        width = codebook_Kn.shape[1]
        eps1 = _gamma(width + 8)
        self._eps = eps1 / (1 - eps1)
        self._tau = (width + 8) * 2.0**-126
        self._mean_n = codebook_Kn.mean(0)
        centred = codebook_Kn - self._mean_n
        largest = float(norms(centred).max())
        # frexp gives largest < 2^exponent; dividing by a power of two is exact.
        self._scale = 2.0 ** -math.frexp(largest)[1] if largest > 0 else 1.0
        self._offset_n = self._mean_n * -self._scale
        centred = centred * self._scale
        self._norm_K = norms(centred)
        self._half_K = self._norm_K.square() / 2
        self._vectors_mK = torch.cat([centred, (self._eps * self._norm_K)[:, None]], 1).float().T
        self._addend_K = ((1 - self._eps) * self._half_K).float()

    def bracket(self, residual_Nn: torch.Tensor, scratch: torch.Tensor) -> Bracket:
        """Lower bounds of every score: one float32 product of (N, n + 1) and (n + 1, K)."""
        require_full_float32()
        # Scaling by a power of two is exact, so this rounds once: s r - s mu.
        a_Nn = torch.add(self._offset_n, residual_Nn, alpha=self._scale)
        norm_N = norms(a_Nn)
        usable_N = norm_N <= _LARGEST_NORM
        rows_Nm = torch.empty(len(a_Nn), self._vectors_mK.shape[0], device=a_Nn.device)
        rows_Nm[:, :-1] = a_Nn
        rows_Nm[:, -1] = norm_N
        if not bool(usable_N.all()):
            rows_Nm.masked_fill_(~usable_N[:, None], 0.0)
        lower_NK = scratch[: rows_Nm.shape[0] * self._addend_K.shape[0]].view(rows_Nm.shape[0], -1)
        torch.addmm(self._addend_K, rows_Nm, self._vectors_mK, alpha=-1, out=lower_NK)
        return Bracket(lower_NK, norm_N, torch.zeros_like(norm_N), usable_N)

    def reach(self, bracket: Bracket, best_N: torch.Tensor) -> torch.Tensor:
        """2 eps (h_j + A C_j) + 2 tau + theta (A + C_j)^2, float64 (N,)."""
        norm_N, best_norm_N = bracket.norm_N, self._norm_K[best_N]
        width_N = 2 * self._eps * (self._half_K[best_N] + norm_N * best_norm_N)
        return width_N + 2 * self._tau * (2 + norm_N) + ORACLE_ROUNDING * (norm_N + best_norm_N).square()


def require_full_float32() -> None:
    """`EnvironmentProblem` if torch may replace float32 products by TF32 or bfloat16 ones: the bound would not hold."""
    modes = {torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision}  # type: ignore[attr-defined]
    if not modes <= {"none", "ieee"} or torch.get_float32_matmul_precision() != "highest":
        raise EnvironmentProblem(
            "torch is set to reduced-precision float32 products, with which the residual search is not exact: "
            "unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE and call torch.set_float32_matmul_precision('highest')"
        )


def norms(x_Nn: torch.Tensor) -> torch.Tensor:
    """float64 (N,): at least the true Euclidean norms, by the margin of float64 rounding."""
    return torch.linalg.vector_norm(x_Nn, dim=1) * _FLOAT64_SAFETY


def _gamma(operations: int) -> float:
    return operations * 2.0**-24 / (1 - operations * 2.0**-24)
