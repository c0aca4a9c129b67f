"""The code of largest cosine in each of several independent codebooks, equal to a float64 oracle.

Shape legend: N features, D codebooks, n width of one chunk of a feature, K vectors of a codebook.

**The oracle.** `unit` makes vectors of length one: norm and division in float64, the result rounded to float32. The
score of code k of codebook d is the float64 product of the feature's d-th unit chunk with the unit vector c_k,
summed in an order fixed by n alone; the code is the argmax, ties to the lower id. A chunk of zeros scores 0 everywhere
and so gets code 0. Nothing depends on the device, the batch shape or the number of threads.

**The fast search** is one float32 product. With u = 2^-24 and gamma_m = m u / (1 - m u), an inner product of n terms in
any order, with or without fused multiply-add, is off by at most gamma_n |x| |c| (Higham, Accuracy and Stability of
Numerical Algorithms, 3.1). Unit vectors rounded to float32 have norms below 1 + 2^-23, the oracle's own rounding
is below 2^-40 for n < 2^12, and underflow adds less than n 2^-126: eps = gamma_{n+2} covers all of it. So
the oracle's choice is among the codes whose fast score is within 2 eps of the best; they are scored again in float64.
It assumes of the hardware what `search` assumes, and refuses TF32 and bfloat16 substitutes likewise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from manifests.errors import InputError
from tokenize_stage.fast_pass import require_full_float32
from tokenize_stage.search import SCORE_BYTES

_MAX_WIDTH = 1 << 12
_PAIR_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}


class CosineSearch:
    """Independent codebooks of unit vectors, prepared once on a device. Not for use by several threads at once."""

    def __init__(self, codebooks: Sequence[NDArray[np.float32]], device: torch.device | str = "cpu") -> None:
        """`codebooks`: D float32 arrays (K_d, n) as `unit_codebook` makes them."""
        if not codebooks:
            raise ValueError("a cosine search needs at least one codebook")
        self.device = torch.device(device)
        self.width = int(codebooks[0].shape[1])
        if not 0 < self.width < _MAX_WIDTH or any(book.shape[1] != self.width for book in codebooks):
            raise ValueError(f"codebooks are one width below {_MAX_WIDTH}, not {[book.shape for book in codebooks]}")
        self.reranked_rows = 0
        """Chunks whose best codes were decided in float64."""
        self._books = [torch.from_numpy(np.ascontiguousarray(book)).to(self.device) for book in codebooks]
        unit_roundoff = (self.width + 2) * 2.0**-24
        self._reach = 2 * unit_roundoff / (1 - unit_roundoff)
        largest = max(len(book) for book in self._books)
        self._rows = min(max(SCORE_BYTES[self.device.type] // (4 * largest), 64), 1 << 16)

    def __call__(self, features_Nm: torch.Tensor) -> torch.Tensor:
        """float32 (N, D * n) -> int32 (N, D) on the search's device, equal to `cosine_oracle` in every element.

        Working memory is bounded whatever N is. Raises `InputError` on NaN or infinity.
        """
        depth = len(self._books)
        if features_Nm.dtype != torch.float32 or features_Nm.shape[1:] != (depth * self.width,):
            raise ValueError(f"features are float32 (N, {depth * self.width}), not {features_Nm.shape}")
        require_full_float32()
        codes_ND = torch.empty(len(features_Nm), depth, dtype=torch.int32, device=self.device)
        for start in range(0, len(features_Nm), self._rows):
            rows = slice(start, start + self._rows)
            chunks_NDn = unit(features_Nm[rows].to(self.device).unflatten(1, (depth, self.width)))
            for d, book_Kn in enumerate(self._books):
                codes_ND[rows, d] = self._best(chunks_NDn[:, d], book_Kn).int()
        return codes_ND

    def _best(self, chunk_Nn: torch.Tensor, book_Kn: torch.Tensor) -> torch.Tensor:
        """int64 (N,): the oracle's choice for unit vectors."""
        score_NK = chunk_Nn @ book_Kn.T
        highest_N, best_N = score_NK.max(1)
        candidates_NK = score_NK >= (highest_N - self._reach - 2.0**-23)[:, None]  # the subtraction rounds as well
        several = (candidates_NK.sum(1) > 1).nonzero()[:, 0]
        self.reranked_rows += len(several)
        step = max(_PAIR_BYTES[self.device.type] // (16 * self.width * len(book_Kn)), 1)
        for rows in several.split(step):
            row, k = candidates_NK[rows].nonzero().unbind(1)
            exact = torch.full((len(rows), len(book_Kn)), -torch.inf, dtype=torch.float64, device=self.device)
            exact[row, k] = product(chunk_Nn[rows][row], book_Kn[k])
            best_N[rows] = exact.max(1).indices  # of equal values the first, as torch promises
        return best_N


def cosine_oracle(features_Nm: torch.Tensor, codebooks: Sequence[NDArray[np.float32]]) -> torch.Tensor:
    """The definition of the right answer: float32 (N, D * n) and D x (K, n) unit vectors -> int32 (N, D)."""
    chunks_NDn = unit(features_Nm.unflatten(1, (len(codebooks), -1)))
    books = [torch.from_numpy(book).to(features_Nm.device) for book in codebooks]
    codes = [product(chunks_NDn[:, d, None], book[None]).max(1).indices for d, book in enumerate(books)]
    return torch.stack(codes, 1).int()


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """float32 (..., n) -> float32 vectors of length one in the same directions; a vector of zeros stays as it is.

    Raises `InputError` on NaN or infinity.
    """
    if not bool(torch.isfinite(vectors).all()):
        raise InputError("the features or the codebook hold NaN or infinity: check the tokenizer's weights and dtype")
    exact = vectors.double()
    norm = product(vectors, vectors).sqrt_()[..., None]
    return torch.where(norm > 0, exact / norm, exact).float()


def unit_codebook(codebook_Kn: torch.Tensor) -> NDArray[np.float32]:
    """float32 (K, n), each row of length one. `InputError` for a row of zeros, which has no direction."""
    if not bool(codebook_Kn.any(1).all()):
        raise InputError("a codebook holds a row of zeros, which has no direction: it was never trained")
    rows: NDArray[np.float32] = unit(codebook_Kn.float()).numpy()
    return rows


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension of x y in float64, broadcasting: elementwise operations only, as in `search`."""
    terms = x.double() * y.double()
    while (width := terms.shape[-1]) > 1:
        half = width // 2
        folded = terms[..., :half] + terms[..., half : 2 * half]
        if width % 2:
            folded[..., 0] += terms[..., -1]
        terms = folded
    return terms[..., 0]
