"""A colour for every code, and code maps: what the visual tokens of an image look like, depth by depth.

Codes whose codebook vectors are alike have colours that are alike: the vectors of a depth are projected on their three
main directions, and a code's rank along each becomes its red, green and blue. Colours of different depths are unrelated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

TILE = 256
"""Edge in pixels of the picture, and of a code map, on a sheet."""

_FITTED_ON = 4096
_GAP = 12
_HEADER = 24
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def code_colours(codebook: NDArray[np.float32]) -> NDArray[np.uint8]:
    """RGB uint8 (K, 3) of the codes of one depth, from its codebook (K, code_dim).

    The directions are those of at most 4,096 evenly spaced vectors, so that a codebook of any size takes a moment.
    """
    size, width = codebook.shape
    centred = codebook.astype(np.float64) - codebook.mean(axis=0, dtype=np.float64)
    some = centred[:: max(1, size // _FITTED_ON)]
    vectors = np.linalg.eigh(some.T @ some)[1][:, ::-1][:, :3]
    vectors *= np.where(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])] < 0, -1, 1)
    along = np.zeros((size, 3))
    along[:, : min(3, width)] = centred @ vectors
    ranks = along.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    return np.round(255 * ranks / max(1, size - 1)).astype(np.uint8)


def code_map(codes: NDArray[np.integer], colours: NDArray[np.uint8], edge: int = TILE) -> Image.Image:
    """The codes (rows, columns) of one depth as an `edge` x `edge` mosaic."""
    return Image.fromarray(colours[codes]).resize((edge, edge), Image.Resampling.NEAREST)


def draw_sheet(
    views: NDArray[np.uint8], codes: NDArray[np.integer], colours: Sequence[NDArray[np.uint8]]
) -> Image.Image:
    """A line for each view uint8 (V, S, S, 3): what the encoder saw, and its codes (V, rows, columns, D) at each depth."""
    font = ImageFont.load_default(size=14)
    step = TILE + _GAP
    sheet = Image.new("RGB", (_GAP + step * (1 + len(colours)), _HEADER + _GAP + step * len(views)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(["view", *(f"depth {depth}" for depth in range(len(colours)))]):
        draw.text((_GAP + column * step, _GAP), title, fill=_INK, font=font)
    for line, (view, codes_YXD) in enumerate(zip(views, codes, strict=True)):
        picture = Image.fromarray(view).resize((TILE, TILE), Image.Resampling.BICUBIC)
        tiles = [picture, *(code_map(codes_YXD[:, :, depth], table) for depth, table in enumerate(colours))]
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (_GAP + column * step, _HEADER + _GAP + line * step))
    return sheet
