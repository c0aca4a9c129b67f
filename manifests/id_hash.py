"""Image ids as 64-bit numbers, computed column by column: what millions of ids are compared by before they are looked at."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SLICE_ROWS = 1 << 14
"""Ids that are hashed at once: their bytes are held as 64-bit numbers meanwhile."""

_SEED = 20260118


def hash_column(ids: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """`hash_ids` of all chunks together."""
    hashes = [hash_ids(piece) for chunk in ids.chunks for piece in pieces(chunk)]
    return np.concatenate(hashes) if hashes else np.empty(0, np.uint64)


def hash_ids(ids: pa.Array) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each string: the sum of its bytes, each times a fixed random number of its position."""
    count = len(ids)
    wide = pa.types.is_large_string(ids.type)
    _, ends, data = ids.buffers()
    offsets = np.frombuffer(ends, np.int64 if wide else np.int32)[ids.offset : ids.offset + count + 1].astype(np.int64)
    if not count or offsets[0] == offsets[-1]:
        return np.zeros(count, np.uint64)
    text = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    place = np.arange(len(text)) - np.repeat(starts, lengths)
    terms = (text + np.uint64(1)) * _weights(int(lengths.max()))[place]
    filled = lengths > 0
    sums = np.zeros(count, np.uint64)
    sums[filled] = np.add.reduceat(terms, starts[filled])
    return sums


def _weights(count: int) -> npt.NDArray[np.uint64]:
    """Odd numbers, so that a byte that differs always changes the sum; the first ones do not depend on `count`."""
    return np.random.default_rng(_SEED).integers(0, 1 << 64, size=count, dtype=np.uint64) | np.uint64(1)


def pieces(chunk: pa.Array) -> Iterator[pa.Array]:
    """Slices of `SLICE_ROWS`, to be hashed one after the other."""
    return (chunk.slice(start, SLICE_ROWS) for start in range(0, len(chunk), SLICE_ROWS))
