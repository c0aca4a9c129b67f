"""What a code means: patches of different pictures that have the same code at the same depth.

Codes are taken evenly from the most common to rare ones, among those that occur in several pictures: the most common
alone would show the background again and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.report.gallery import Card

CODES = 10
"""Codes shown of each depth."""

PATCHES = 6
"""Pictures shown of each code."""

FEWEST = 3
"""Pictures in which a code must occur to be shown."""

PATCH_EDGE = 64


@dataclass(frozen=True)
class Meaning:
    """A code of a depth: in how many pictures and at how many positions it occurs, and where it is shown.

    `shown`: (index of a card, position) of PATCHES pictures at most, one position each.
    """

    code: int
    pictures: int
    positions: int
    shown: list[tuple[int, int]]


def find_meanings(cards: Sequence[Card], depth: int, size: int) -> list[Meaning]:
    """Some codes of one depth (codebook size K) that several pictures share. Padding cells do not count."""
    seen = [
        (number, np.flatnonzero(card.shows_picture_P), card.codes_PD[card.shows_picture_P, depth])
        for number, card in enumerate(cards)
        if card.picture is not None and card.codes_PD is not None
    ]
    pictures, positions = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for _, _, codes in seen:
        counts = np.bincount(codes, minlength=size)
        positions += counts
        pictures += counts > 0
    candidates = np.flatnonzero(pictures >= FEWEST)
    ranked = candidates[np.lexsort((candidates, -positions[candidates], -pictures[candidates]))]
    if not len(ranked):
        return []
    at = np.unique(np.linspace(0, len(ranked) - 1, min(CODES, len(ranked))).round().astype(int))
    return [
        Meaning(int(code), int(pictures[code]), int(positions[code]), _where(seen, int(code))) for code in ranked[at]
    ]


def _where(
    seen: Sequence[tuple[int, NDArray[np.int64], NDArray[np.unsignedinteger]]], code: int
) -> list[tuple[int, int]]:
    """One position in each of some pictures, evenly spaced over those that have the code."""
    places = []
    for number, positions, codes in seen:
        mine = positions[codes == code]
        if len(mine):
            places.append((number, int(mine[len(mine) // 2])))
    at = np.unique(np.linspace(0, len(places) - 1, min(PATCHES, len(places))).round().astype(int))
    return [places[index] for index in at]


def draw_patches(cards: Sequence[Card], meaning: Meaning, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """The patches side by side, each in the middle of its surroundings and framed: uint8 (64, 64 n, 3)."""
    tiles = []
    for number, position in meaning.shown:
        picture = cards[number].picture
        assert picture is not None  # noqa: S101 - only such cards are looked at
        tiles.append(_patch(picture, divmod(position, grid[1]), grid))
    return np.concatenate(tiles, axis=1)


def _patch(picture: NDArray[np.uint8], at: tuple[int, int], grid: tuple[int, int]) -> NDArray[np.uint8]:
    tall, wide = picture.shape[0] / grid[0], picture.shape[1] / grid[1]
    top, left = (at[0] - 1) * tall, (at[1] - 1) * wide
    image = Image.fromarray(picture)
    around = image.transform(
        (PATCH_EDGE, PATCH_EDGE),
        Image.Transform.EXTENT,
        (left, top, left + 3 * wide, top + 3 * tall),
        Image.Resampling.BILINEAR,
        fillcolor=(127, 127, 127),
    )
    draw = ImageDraw.Draw(around)
    low, high = PATCH_EDGE // 3, 2 * PATCH_EDGE // 3
    draw.rectangle((low - 2, low - 2, high + 2, high + 2), outline=(0, 0, 0))
    draw.rectangle((low - 1, low - 1, high + 1, high + 1), outline=(255, 255, 255))
    return np.asarray(around)
