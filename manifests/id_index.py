"""Where each image of an inventory stands: exact, about 20 bytes an image, and none of them a Python object.

A dictionary of 10 million ids takes two gigabytes. Here an id is a 64-bit hash, the hashes are sorted, and whatever they
find is compared with the text itself, so that no answer depends on luck.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.id_hash import hash_column, hash_ids, pieces

Rows = npt.NDArray[np.int64]


class IdIndex:
    """The places of some ids, each of which may occur once. Building costs nothing until it is needed.

    Ids asked for in the order in which they stand, as those of an unchanged source are, are found by comparison alone.
    """

    def __init__(self, ids: pa.ChunkedArray) -> None:
        self._ids = ids
        self._chunks = [chunk for chunk in ids.chunks if len(chunk)]
        self._starts = np.cumsum([0, *map(len, self._chunks)])
        self._next = 0
        self._sorted: npt.NDArray[np.uint64] | None = None
        self._order: Rows = np.empty(0, np.int64)

    def find(self, wanted: pa.ChunkedArray) -> Rows:
        """For each of `wanted` its place among the ids, or -1."""
        start = self._next  # looked at once: another thread may be asking too
        end = start + len(wanted)
        if end <= len(self._ids) and self._ids.slice(start, len(wanted)).equals(wanted):
            found = np.arange(start, end)
        else:
            chunks = [self._look_up(piece) for chunk in wanted.chunks for piece in pieces(chunk)]
            found = np.concatenate(chunks) if chunks else np.empty(0, np.int64)
        if len(found) and found[-1] >= 0:
            self._next = int(found[-1]) + 1
        return found

    def duplicate(self) -> str | None:
        """An id that occurs twice, or None."""
        hashes, order = self._hashes(), self._order
        for at in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            run = at
            while run >= 0 and hashes[run] == hashes[at]:  # three ids with one hash stand side by side in any order
                if self._text(int(order[run])) == self._text(int(order[at + 1])):
                    return self._text(int(order[at + 1]))
                run -= 1
        return None

    def _look_up(self, wanted: pa.Array) -> Rows:
        hashes = self._hashes()
        mine = hash_ids(wanted)
        at = np.searchsorted(hashes, mine)
        found = np.full(len(wanted), -1, np.int64)
        open_rows = np.arange(len(wanted))
        while len(open_rows):  # a second turn only where different ids have one hash
            at_open = at[open_rows]
            here = at_open < len(hashes)
            here[here] = hashes[at_open[here]] == mine[open_rows[here]]
            open_rows = open_rows[here]
            places = self._order[at[open_rows]]
            same = self._equal(wanted, open_rows, places)
            found[open_rows[same]] = places[same]
            open_rows = open_rows[~same]
            at[open_rows] += 1
        return found

    def _equal(self, wanted: pa.Array, rows: Rows, places: Rows) -> npt.NDArray[np.bool_]:
        """Whether `wanted[rows]` are the texts at `places`."""
        same = np.zeros(len(rows), bool)
        chunk_of = np.searchsorted(self._starts, places, side="right") - 1
        for chunk in np.unique(chunk_of):
            mine = np.flatnonzero(chunk_of == chunk)
            left = wanted.take(_int64s(rows[mine]))
            right = self._chunks[chunk].take(_int64s(places[mine] - self._starts[chunk]))
            same[mine] = np.from_dlpack(pc.equal(left, right).cast(pa.uint8())).astype(bool)
        return same

    def _hashes(self) -> npt.NDArray[np.uint64]:
        if self._sorted is None:
            hashes = hash_column(self._ids)
            self._order = np.argsort(hashes)
            self._sorted = hashes[self._order]
        return self._sorted

    def _text(self, place: int) -> str:
        return str(self._ids[place].as_py())


def _int64s(values: Rows) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])
