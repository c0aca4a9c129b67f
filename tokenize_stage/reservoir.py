"""A uniform sample of a stream of feature vectors, in memory that is bounded whatever the stream's length."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class Reservoir:
    """At most `capacity` rows, each row of the stream kept with the same chance (Vitter's algorithm R).

    Which rows stay depends on the seed and their order alone, not on how the stream is cut into batches.
    """

    def __init__(self, capacity: int, width: int, seed: int) -> None:
        self._rows_Nn = np.empty((capacity, width), np.float32)  # pages are only taken as they fill up
        self._random = np.random.default_rng(seed)
        self.seen = 0

    def add(self, rows_Nn: npt.NDArray[np.float32]) -> None:
        """Offer rows, float32 (N, width)."""
        capacity = len(self._rows_Nn)
        fresh = max(0, min(len(rows_Nn), capacity - self.seen))
        self._rows_Nn[self.seen : self.seen + fresh] = rows_Nn[:fresh]
        rest = rows_Nn[fresh:]
        place = np.arange(self.seen + fresh, self.seen + len(rows_Nn))
        slot = (self._random.random(len(rest)) * (place + 1)).astype(np.int64)
        kept = slot < capacity
        self._rows_Nn[slot[kept]] = rest[kept]  # of rows for one slot numpy keeps the last, as the algorithm does
        self.seen += len(rows_Nn)

    def sample(self) -> npt.NDArray[np.float32]:
        """The rows held, float32 (min(seen, capacity), width): a view, not a copy."""
        return self._rows_Nn[: self.seen]
