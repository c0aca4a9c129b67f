"""Which image ids come twice among very many: exact, in 8 bytes an id, and none of them a Python object.

An id is remembered as a 64-bit hash. Only ids whose hash came twice are looked at, and where none did, as is usual, none is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.id_hash import hash_column

_BUCKET_BITS = 4

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Repeated:
    """How many ids there are more than once, and the one among them that came first."""

    count: int
    first: str


class RepeatedIds:
    """Takes ids column by column; then says which of them came more than once."""

    def __init__(self) -> None:
        self._hashes: list[Hashes] = []

    def add(self, ids: pa.ChunkedArray) -> None:
        """Remember some ids."""
        self._hashes.append(hash_column(ids))

    def hashes(self) -> Hashes:
        """The hashes that came more than once, sorted; forgets the ids.

        Sorting needs a copy of what it sorts, hence a sixteenth of them at a time, by their upper bits.
        """
        found = [np.empty(0, np.uint64)]
        for bucket in range(1 << _BUCKET_BITS):
            mine = [part[part >> np.uint64(64 - _BUCKET_BITS) == bucket] for part in self._hashes]
            ordered = np.sort(np.concatenate(mine)) if mine else found[0]
            found.append(np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))
        self._hashes.clear()
        return np.concatenate(found)

    def find(self, again: Iterable[pa.ChunkedArray]) -> Repeated | None:
        """The ids that came more than once; forgets the ids. `again` are all of them anew, if they are looked at."""
        suspects = self.hashes()
        if not len(suspects):
            return None
        chunks = [chunk for ids in again for chunk in ids.filter(pa.array(have_hash(ids, suspects))).chunks]
        counts = pc.value_counts(pa.chunked_array(chunks, pa.string()))
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        return Repeated(len(twice), twice[0]["values"].as_py()) if len(twice) else None


def have_hash(ids: pa.ChunkedArray, hashes: Hashes) -> npt.NDArray[np.bool_]:
    """Which ids have one of these hashes, which are sorted."""
    mine = hash_column(ids)
    if not len(hashes):
        return np.zeros(len(mine), bool)
    at = np.minimum(np.searchsorted(hashes, mine), len(hashes) - 1)
    found: npt.NDArray[np.bool_] = hashes[at] == mine
    return found


def columns_of(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.ChunkedArray]:
    """The first column of each batch."""
    return (pa.chunked_array([batch.column(0)]) for batch in batches)
