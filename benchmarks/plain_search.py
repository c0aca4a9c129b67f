"""Residual search as it is usually written: the matrix of distances by one product, argmin, subtract, in one dtype."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tokenize_stage.search import chunk_rows


class PlainSearch:
    """float32 (N, n) -> int32 (N, D), everything after the upload in `dtype`.

    |r|^2 is left out of |r|^2 - 2 r.c + |c|^2: it does not move the argmin, and so the contestant is faster. Rows go in
    the chunks that our search takes.
    """

    def __init__(self, codebooks: Sequence[npt.NDArray[np.float32]], device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._books = [torch.from_numpy(book).to(device, dtype) for book in codebooks]
        self._square_norms = [book.square().sum(1) for book in self._books]
        self._rows = chunk_rows(max(len(book) for book in self._books), device)

    def __call__(self, features_Nn: torch.Tensor) -> torch.Tensor:
        starts = range(0, len(features_Nn), self._rows)
        return torch.cat([self._search(features_Nn[start : start + self._rows]) for start in starts])

    def _search(self, features_Nn: torch.Tensor) -> torch.Tensor:
        residual_Nn = features_Nn.to(self._device, self._dtype)
        codes: list[torch.Tensor] = []
        for book, square_norm in zip(self._books, self._square_norms, strict=True):
            code_N = torch.addmm(square_norm, residual_Nn, book.T, alpha=-2).argmin(1)
            residual_Nn = residual_Nn - book[code_N]
            codes.append(code_N.int())
        return torch.stack(codes, 1)
