"""How many samples of each file an epoch holds, and which."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train_stage.mixture import mix

files = st.lists(st.tuples(st.integers(0, 40), st.floats(0.01, 3.0)), min_size=1, max_size=4)


@given(files, st.integers(0, 2**63 - 1))
def test_every_file_gives_its_ratio_in_its_own_samples(parts: list[tuple[int, float]], seed: int) -> None:
    counts, ratios = [count for count, _ in parts], [ratio for _, ratio in parts]
    mixed = mix(counts, ratios, seed)
    starts = np.cumsum([0, *counts])
    for number, (count, ratio) in enumerate(parts):
        own = mixed[(mixed >= starts[number]) & (mixed < starts[number + 1])] - starts[number]
        whole = int(ratio)
        assert len(own) == whole * count + round((ratio - whole) * count)
        times = np.bincount(own, minlength=count)
        assert set(times.tolist()) <= {whole, whole + 1}
    assert mixed.tolist() == mix(counts, ratios, seed).tolist()


def test_a_whole_mixture_is_the_files_in_order() -> None:
    assert mix([3, 2], [1, 1], 7).tolist() == [0, 1, 2, 3, 4]
