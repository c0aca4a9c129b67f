"""Views become batches of a fixed shape whose composition the unit alone decides.

A unit is a stream of views: member after member, each with all its views, where a reject counts as one view. View n of
the stream sits in slot n % B of batch n // B. So it does not matter who decoded a view or when, how many workers there
are, or where a killed run stopped: what an image becomes is decided by its bytes, and the number of its views by its
width and height, which a committed row remembers. A unit that is written again leaves the slots of the rows it copies
empty and puts the others where encoding all of it would. With one view an image this is member i in slot i % B.

An image could own as many slots as any image can have instead; with LLaVA-NeXT's grids and wide pictures the encoder
would then spend two views in five on nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from itertools import cycle
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ARRAYS = 3
"""One being encoded, one that the encoder turns to at once, one being filled."""


class Batch(NamedTuple):
    """`views_BSS3` of which `filled_B` are views of images, the others zeros; `first` is the stream's place of slot 0."""

    views_BSS3: npt.NDArray[np.uint8]
    filled_B: npt.NDArray[np.bool_]
    first: int


def fill_batches(
    images: Iterable[npt.NDArray[np.uint8] | int], batch_size: int, size: int
) -> Generator[Batch, None, None]:
    """Batches (B = `batch_size`, S = `size`) of a stream of images, each given as its views (V, S, S, 3), uint8, or as
    the number of slots to leave empty. A batch without a view is left out.

    There are `ARRAYS` arrays in turn: one that was yielded is written again after as many more were asked for.
    """
    arrays = cycle(np.empty((ARRAYS, batch_size, size, size, 3), np.uint8))
    views_BSS3 = next(arrays)
    filled_B = np.zeros(batch_size, bool)
    place = 0

    for image in images:
        left = image if isinstance(image, int) else len(image)
        while left:
            slot = place % batch_size
            count = min(left, batch_size - slot)
            if not isinstance(image, int):
                views_BSS3[slot : slot + count] = image[len(image) - left :][:count]
                filled_B[slot : slot + count] = True
            place += count
            left -= count
            if place % batch_size == 0 and filled_B.any():
                views_BSS3[~filled_B] = 0
                yield Batch(views_BSS3, filled_B, place - batch_size)
                views_BSS3 = next(arrays)
                filled_B = np.zeros(batch_size, bool)
    if filled_B.any():
        views_BSS3[~filled_B] = 0
        yield Batch(views_BSS3, filled_B, place - place % batch_size)
