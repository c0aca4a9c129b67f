"""Views become batches: a view's slot is its place in the unit's stream, and the rest of a batch is zeros."""

from __future__ import annotations

from collections import deque

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tokenize_stage.batches import ARRAYS, fill_batches

SIZE = 2
streams = st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=40)
"""Images as (views, whether they are there)."""


def stream_of(images: list[tuple[int, bool]]) -> tuple[list[NDArray[np.uint8] | int], NDArray[np.uint8]]:
    """The images as `fill_batches` takes them, each view of another colour, and the colours of the whole stream."""
    items: list[NDArray[np.uint8] | int] = []
    colours: list[int] = []
    for views, there in images:
        mine = [(len(colours) + view) % 255 + 1 if there else 0 for view in range(views)]
        colours += mine
        items.append(np.full((views, SIZE, SIZE, 3), np.reshape(mine, (-1, 1, 1, 1)), np.uint8) if there else views)
    return items, np.array(colours, np.uint8)


@given(streams, st.integers(1, 9))
def test_every_view_is_in_its_slot_and_batches_without_views_are_left_out(
    images: list[tuple[int, bool]], batch_size: int
) -> None:
    items, colours = stream_of(images)
    seen = np.zeros(-(-len(colours) // batch_size) * batch_size, np.uint8)
    firsts = []
    for batch in fill_batches(items, batch_size, SIZE):
        assert batch.views_BSS3.shape == (batch_size, SIZE, SIZE, 3)
        assert batch.filled_B.any()
        assert batch.first % batch_size == 0
        assert not batch.views_BSS3[~batch.filled_B].any()
        assert (batch.views_BSS3 == batch.views_BSS3[:, :1, :1, :1]).all()
        seen[batch.first : batch.first + batch_size] = batch.views_BSS3[:, 0, 0, 0]
        assert ((batch.views_BSS3[:, 0, 0, 0] > 0) == batch.filled_B).all()
        firsts.append(batch.first)
    assert seen[: len(colours)].tolist() == colours.tolist()
    assert firsts == sorted(set(firsts))


@given(streams)
def test_batches_that_are_still_in_use_are_left_alone(images: list[tuple[int, bool]]) -> None:
    items, _ = stream_of(images)
    used: deque[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = deque(maxlen=ARRAYS - 1)
    for batch in fill_batches(items, 4, SIZE):
        assert all(np.array_equal(*before) for before in used)
        used.append((batch.views_BSS3, batch.views_BSS3.copy()))
