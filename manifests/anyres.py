"""LLaVA-NeXT's tiling: an image becomes one view of the whole and a grid of tiles that keeps its aspect ratio.

The arithmetic is that of LLaVA's `process_anyres_image` and of transformers' Pillow-backed `LlavaNextImageProcessor`,
floating point included, because a trained model must see at inference what it saw in training. The layout is a
function of the image's width and height, so shards need no column for it.

Shape suffixes: V views (the base view, then the tiles row by row), S edge of a view, L positions after rearranging.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from manifests.schema import Geometry

NEWLINE = -1
"""Where `anyres_order` puts no position but the model's newline vector."""


class Tiling(NamedTuple):
    """How an image lies on its canvas of `rows` x `columns` tiles: resized to `width` x `height`, at `left`, `top`."""

    rows: int
    columns: int
    width: int
    height: int
    left: int
    top: int


class AnyresLayout(NamedTuple):
    """The tiles of an image, and the part of their joined grid of positions that is not padding.

    Tiles are `rows` x `columns`; their positions, joined, are rows `top` to `bottom` and columns `left` to `right`
    (ends not included) of the unpadded grid.
    """

    rows: int
    columns: int
    top: int
    bottom: int
    left: int
    right: int


def best_pinpoint(width: int, height: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The (height, width) of `pinpoints` that keeps most pixels of the image, and of those the one that pads least.

    The first of equals. LLaVA's `select_best_resolution`, the flooring of the scaled edges included.
    """

    def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=merit)


def tiling(width: int, height: int, geometry: Geometry) -> Tiling:
    """How an image of `width` x `height` pixels is tiled: scaled to fit its best pinpoint, rounded up, centred."""
    tall, wide = best_pinpoint(width, height, geometry.grid_pinpoints)
    by_width, by_height = wide / width, tall / height
    if by_width < by_height:
        new_width, new_height = wide, min(math.ceil(height * by_width), tall)
    else:
        new_width, new_height = min(math.ceil(width * by_height), wide), tall
    return Tiling(
        rows=tall // geometry.size,
        columns=wide // geometry.size,
        width=new_width,
        height=new_height,
        left=(wide - new_width) // 2,
        top=(tall - new_height) // 2,
    )


def most_views(geometry: Geometry) -> int:
    """The views that an image can have: 1 in the modes with one view, 1 + the tiles of the largest pinpoint else."""
    return 1 + max((tall * wide // geometry.size**2 for tall, wide in geometry.grid_pinpoints), default=0)


def for_each_size(function: Callable[[int, int], int], sizes: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """`function(width, height)` of pictures of sizes (M, 2), int64 (M,); it is called once for each distinct size."""
    packed = sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1]
    distinct, where = np.unique(packed, return_inverse=True)
    values = [function(size >> 32, size & 0xFFFFFFFF) for size in distinct.tolist()]
    return np.array(values, dtype=np.int64)[where]


def view_counts(sizes: NDArray[np.integer[Any]], geometry: Geometry) -> NDArray[np.int64]:
    """The number of views, int64 (M,), that `anyres` makes of pictures of sizes (M, 2): width, height."""

    def views(width: int, height: int) -> int:
        tall, wide = best_pinpoint(width, height, geometry.grid_pinpoints)
        return 1 + tall * wide // geometry.size**2

    return for_each_size(views, sizes)


def anyres_views(picture: Image.Image, geometry: Geometry) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The views uint8 (V, S, S, 3) of an RGB picture, and their boxes float64 (V, 4) in its pixels.

    The base view is the whole picture squashed to S x S. A tile's box reaches outside the picture where it is padded.
    """
    size = geometry.size
    tiles = tiling(*picture.size, geometry)
    canvas = np.empty((tiles.rows * size, tiles.columns * size, 3), np.uint8)
    canvas[:] = geometry.background
    resized = picture.resize((tiles.width, tiles.height), Image.Resampling.BICUBIC)
    canvas[tiles.top : tiles.top + tiles.height, tiles.left : tiles.left + tiles.width] = np.asarray(resized)

    views_VSS3 = np.empty((1 + tiles.rows * tiles.columns, size, size, 3), np.uint8)
    views_VSS3[0] = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
    grid = views_VSS3[1:].reshape(tiles.rows, tiles.columns, size, size, 3)
    grid[:] = canvas.reshape(tiles.rows, size, tiles.columns, size, 3).swapaxes(1, 2)

    x = (np.arange(tiles.columns + 1) * size - tiles.left) * (picture.width / tiles.width)
    y = (np.arange(tiles.rows + 1) * size - tiles.top) * (picture.height / tiles.height)
    boxes_V4 = np.empty((len(views_VSS3), 4))
    boxes_V4[0] = 0, 0, *picture.size
    cells = boxes_V4[1:].reshape(tiles.rows, tiles.columns, 4)
    cells[..., 0], cells[..., 2] = x[:-1], x[1:]
    cells[..., 1], cells[..., 3] = y[:-1, None], y[1:, None]
    return views_VSS3, boxes_V4


def anyres_layout(width: int, height: int, geometry: Geometry, grid: tuple[int, int]) -> AnyresLayout:
    """The tiles of an image of `width` x `height` pixels and what LLaVA-NeXT's `unpad_image` keeps of their positions.

    grid: (rows, columns) of positions in a view. The part that is kept comes from the aspect ratios alone, as in
    transformers (rounded to 7 digits, then floored): at its edges it can hold a row or column that is partly padding,
    or miss one that shows a little of the picture.
    """
    tiles = tiling(width, height, geometry)
    down, across = tiles.rows * grid[0], tiles.columns * grid[1]
    top = left = 0
    if width / height > across / down:
        top = (down - int(round(height * (across / width), 7))) // 2
    else:
        left = (across - int(round(width * (down / height), 7))) // 2
    return AnyresLayout(tiles.rows, tiles.columns, top, down - top, left, across - left)


def anyres_order(width: int, height: int, geometry: Geometry, grid: tuple[int, int]) -> NDArray[np.int64]:
    """The order in which LLaVA-NeXT reads an image's positions: int64 (L,), indices into the V * P of a shard's row.

    First the base view; then the joined grid of the tiles row by row, without its padding, each row followed by
    `NEWLINE`. Codes, boxes and masks indexed by it stand like the features of transformers' `pack_image_features`.
    """
    layout = anyres_layout(width, height, geometry, grid)
    rows, columns = grid
    positions = np.arange((1 + layout.rows * layout.columns) * rows * columns)
    base, tiles = positions[: rows * columns], positions[rows * columns :]
    by_row = tiles.reshape(layout.rows, layout.columns, rows, columns).swapaxes(1, 2)
    joined = by_row.reshape(layout.rows * rows, layout.columns * columns)
    kept = joined[layout.top : layout.bottom, layout.left : layout.right]
    return np.concatenate([base, np.pad(kept, ((0, 0), (0, 1)), constant_values=NEWLINE).reshape(-1)])
