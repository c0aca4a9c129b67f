"""How often an epoch goes through each data file: ratios of a mixture, decided once and the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def mix(counts: Sequence[int], ratios: Sequence[float], seed: int) -> NDArray[np.int64]:
    """Indices into the samples of several files, one file after the other, int64.

    counts: usable samples of each file; ratios: how often an epoch goes through it. A whole number repeats the file;
    a fraction takes that share of it, chosen by (seed, number of the file) and rounded to whole samples, in the
    file's order. Raises ValueError when the two differ in length.
    """
    chosen = []
    start = 0
    for number, (count, ratio) in enumerate(zip(counts, ratios, strict=True)):
        whole = int(ratio)
        chosen += [np.arange(start, start + count)] * whole
        part = round((ratio - whole) * count)
        if part:
            # Philox's raw stream is the same in every NumPy version, see `train_stage.plan`.
            raw = np.random.Philox(key=np.array([seed, number], dtype=np.uint64)).random_raw(count)
            chosen.append(start + np.sort(np.argsort(raw, kind="stable")[:part]))
        start += count
    return np.concatenate(chosen).astype(np.int64) if chosen else np.empty(0, dtype=np.int64)
