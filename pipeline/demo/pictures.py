"""Pictures beside their code maps: what the visual tokens of an image look like, depth by depth.

Every code has one colour. Codes whose codebook vectors are alike have colours that are alike: the vectors of a depth
are projected on their three main directions, and a code's rank along each becomes its red, green and blue. Colours of
different depths are unrelated.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

TILE = 128
"""Edge in pixels of a picture, and of a code map."""

_GAP = 12
_TEXT_WIDTH = 280
_WRAP = 44
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


@dataclass(frozen=True)
class Row:
    """A picture (H, W, 3) uint8, its codes (rows, columns, D), and lines of text that stand beside them."""

    picture: NDArray[np.uint8]
    codes: NDArray[np.int64]
    text: Sequence[str]


def code_colours(codebook: NDArray[np.float32]) -> NDArray[np.uint8]:
    """RGB (K, 3) of the codes of one depth, from its codebook (K, code_dim)."""
    size = len(codebook)
    centred = codebook.astype(np.float64) - codebook.mean(axis=0, dtype=np.float64)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:3]
    along = np.zeros((size, 3))
    along[:, : len(directions)] = centred @ directions.T
    ranks = along.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    return np.round(255 * ranks / max(1, size - 1)).astype(np.uint8)


def code_map(codes: NDArray[np.int64], colours: NDArray[np.uint8]) -> Image.Image:
    """The codes (rows, columns) of one depth as a `TILE` x `TILE` mosaic."""
    return Image.fromarray(colours[codes]).resize((TILE, TILE), Image.Resampling.NEAREST)


def draw_sheet(rows: Sequence[Row], codebooks: Sequence[NDArray[np.float32]]) -> Image.Image:
    """One line for each row: the picture, its code map at every depth, and its text."""
    colours = [code_colours(codebook) for codebook in codebooks]
    font = ImageFont.load_default(size=13)
    step = TILE + _GAP
    header = 2 * _GAP + 8
    sheet = Image.new("RGB", (_GAP + step * (1 + len(colours)) + _TEXT_WIDTH, header + step * len(rows)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(["picture", *(f"depth {depth}" for depth in range(len(colours)))]):
        draw.text((_GAP + column * step, _GAP), title, fill=_INK, font=font)
    for number, row in enumerate(rows):
        top = header + number * step
        picture = Image.fromarray(row.picture).resize((TILE, TILE), Image.Resampling.BICUBIC)
        tiles = [picture, *(code_map(row.codes[:, :, depth], table) for depth, table in enumerate(colours))]
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (_GAP + column * step, top))
        lines = [line for paragraph in row.text for line in textwrap.wrap(paragraph, _WRAP) or [""]]
        draw.multiline_text((_GAP + len(tiles) * step, top), "\n".join(lines), fill=_INK, font=font, spacing=3)
    return sheet
