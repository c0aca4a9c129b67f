"""How an image becomes tokens of the language model: how many there are, and which cell of which view each of them is.

LLaVA: the cells of the one view, row by row. LLaVA-NeXT, for geometry `anyres`: the base view, then the joined grid of the
tiles row by row without its padding, each row ended by a token that is no cell (`manifests.anyres.anyres_order`).

Shapes: V views of an image, P positions of a view, M images, N newline tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manifests.anyres import NEWLINE, anyres_layout, anyres_order, for_each_size
from manifests.schema import Geometry
from train_stage.batch import NO_TOKEN


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of an image, as its geometry and the tower's (rows, columns) of positions in a view decide them."""

    geometry: Geometry
    grid: tuple[int, int]

    @property
    def positions(self) -> int:
        """P, the cells of a view."""
        return self.grid[0] * self.grid[1]

    @property
    def by_size(self) -> bool:
        """Whether the number of tokens depends on the picture's width and height."""
        return self.geometry.mode == "anyres"

    def count(self, width: int, height: int) -> int:
        """Tokens of a picture of `width` x `height` pixels."""
        if not self.by_size:
            return self.positions
        layout = anyres_layout(width, height, self.geometry, self.grid)
        return self.positions + (layout.bottom - layout.top) * (layout.right - layout.left + 1)

    def counts(self, sizes: NDArray[np.int32]) -> NDArray[np.int64]:
        """Tokens int64 (M,) of pictures of sizes (M, 2): width, height."""
        if not self.by_size:
            return np.full(len(sizes), self.positions, dtype=np.int64)
        return for_each_size(self.count, sizes)

    def order(self, width: int, height: int) -> NDArray[np.int64]:
        """The cell of each token: int64 (tokens,), indices into the V * P cells of the picture, or `NEWLINE`."""
        if not self.by_size:
            return np.arange(self.positions)
        return anyres_order(width, height, self.geometry, self.grid)


def locate(
    order: NDArray[np.int64], places: NDArray[np.int64], views: int, positions: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the cells of an image's views and its newlines stand in the text.

    order: the cell of each of its tokens; places: the index of each of its tokens. Returns (V, P) indices, `NO_TOKEN`
    for the cells that have no token, and (N,) indices.
    """
    is_cell = order != NEWLINE
    cells = np.full(views * positions, NO_TOKEN, dtype=np.int64)
    cells[order[is_cell]] = places[is_cell]
    return cells.reshape(views, positions), places[~is_cell]
