"""Pictures for a benchmark that reads real files: JPEGs of mixed sizes whose spectrum falls off as a photograph's does."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

SIZES = ((640, 480), (480, 640), (640, 427), (500, 375), (336, 336), (1024, 768), (800, 600), (427, 640))
"""(width, height), most of them as in COCO; a picture has one of them in turn."""

DISTINCT = 1000
"""Pictures beyond so many are the same files under other names: a benchmark reads them from the page cache anyway."""

_COARSEST = 8


def make_pictures(folder: Path, count: int) -> Path:
    """`count` JPEGs `00/000000.jpg`, … below `folder`, always the same; those that are there stay."""
    for number in range(count):
        file = _file(folder, number)
        if file.exists():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if number >= DISTINCT:
            os.link(_file(folder, number % DISTINCT), file)
        else:
            _save(photograph(number), file)
    return folder


def photograph(seed: int) -> npt.NDArray[np.uint8]:
    """(H, W, 3): noise at every scale, each octave half as strong as the one above it, and grain."""
    rng = np.random.default_rng(seed)
    width, height = SIZES[seed % len(SIZES)]
    pixels = rng.normal(0, 3, (height, width, 3)).astype(np.float32) + 110
    cell, strength = max(width, height) // 2, 60.0
    while cell >= _COARSEST:
        shape = (height // cell + 2, width // cell + 2)
        for channel in range(3):
            coarse = Image.fromarray(rng.normal(0, strength, shape).astype(np.float32))
            pixels[..., channel] += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        cell, strength = cell // 2, strength / 2
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number // 1000:02d}" / f"{number:06d}.jpg"


def _save(pixels: npt.NDArray[np.uint8], file: Path) -> None:
    unfinished = file.with_suffix(".unfinished")
    Image.fromarray(pixels).save(unfinished, "JPEG", quality=88)
    unfinished.replace(file)
