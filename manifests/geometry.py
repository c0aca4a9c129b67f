"""Oriented RGB pixels become square uint8 views, and positions of a view become boxes in source pixels.

Shape suffixes: V views, S edge of a view, P positions (grid rows x columns, row-major).
All resizing is the bicubic of the Pillow that is installed. Its passes round to 8 bits in between and Pillow 13 runs
them in another order than 12 for many tall images, which moves some pixels by one level: the probe hash in the
fingerprint tells such versions apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from manifests.anyres import anyres_views
from manifests.decode import POLICY
from manifests.schema import Geometry

GEOMETRY_VERSION = 1
"""Part of every fingerprint; raised when the definitions below change."""

_STRIP_PIXELS = 2**24
"""Pixels of the largest strip of a padded square that is made at once, 64 MiB in Pillow."""

_WHOLE_PIXELS = 2**26
"""Pixels of the largest resized picture that `crop` makes as a whole, 256 MiB in Pillow."""

Box = tuple[float, float, float, float]


def make_views(image: NDArray[np.uint8], geometry: Geometry) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Cut and resize an image into the views that an encoder sees.

    image: uint8 (H, W, 3), RGB and upright, as `decode` returns it.
    Returns views uint8 (V, S, S, 3) and their boxes float32 (V, 4): x0, y0, x1, y1 in pixels of `image`, where pixel
    (row i, column j) covers [j, j + 1) x [i, i + 1). With S = geometry.size and M = max(H, W), V is 1 in all modes but
    the last and

    - squash: the whole image to S x S, aspect ratio not kept. Box (0, 0, W, H).
    - pad: the image on an M x M square of `background`, at offset ((M - W) // 2, (M - H) // 2), then to S x S. LLaVA's
      `expand2square`. The box is that square: it reaches outside the image.
    - crop: the shorter edge to S, the longer one to L = S * longer // shorter, then the S x S window at offset
      (L - S) // 2 along the longer edge. CLIP's preprocessing. The box is the window in source pixels. When S x L is
      above 2^26 pixels (a strip 450 times as long as wide, at S = 384) only the window is resized, which may differ
      from the definition by a few levels.
    - anyres: first the whole image squashed, then tiles of the image on a larger canvas: `manifests.anyres`.

    Raises ValueError for an array of another type or shape, a programming error.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"an image is uint8 (H, W, 3), not {image.dtype} {image.shape}")
    picture = Image.fromarray(np.ascontiguousarray(image))
    if geometry.mode == "anyres":
        views, boxes = anyres_views(picture, geometry)
        return views, boxes.astype(np.float32)
    box: Box
    if geometry.mode == "squash":
        view, box = _bicubic(picture, geometry.size, geometry.size), (0.0, 0.0, picture.width, picture.height)
    elif geometry.mode == "pad":
        view, box = _pad(picture, geometry.size, geometry.background)
    else:
        view, box = _crop(picture, geometry.size)
    return np.asarray(view)[None].copy(), np.array([box], dtype=np.float32)


def _bicubic(picture: Image.Image, width: int, height: int) -> Image.Image:
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _pad(picture: Image.Image, size: int, background: tuple[int, int, int]) -> tuple[Image.Image, Box]:
    """Resize the padded square without making it: that of a 1,000 x 20,000 screenshot would take 1.6 GB.

    Pillow resizes a square horizontally, then vertically; a row's horizontal pass looks at that row only, so rows may
    go through it in strips and the bars all at once, and the pixels are those of the whole square.
    """
    width, height = picture.size
    if width == height:
        return _bicubic(picture, size, size), (0, 0, width, height)
    edge = max(width, height)
    left, top = (edge - width) // 2, (edge - height) // 2
    across = Image.new("RGB", (size, edge))  # the square after its horizontal pass
    if width == edge:
        bar = _bicubic(Image.new("RGB", (edge, 1), background), size, 1)
        across.paste(bar.resize((size, edge), Image.Resampling.NEAREST))
        across.paste(_bicubic(picture, size, height), (0, top))
    else:
        rows = max(1, _STRIP_PIXELS // edge)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            strip = Image.new("RGB", (edge, last - first), background)
            strip.paste(picture.crop((0, first, width, last)), (left, 0))
            across.paste(_bicubic(strip, size, last - first), (0, first))
    return _bicubic(across, size, size), (-left, -top, edge - left, edge - top)


def _crop(picture: Image.Image, size: int) -> tuple[Image.Image, Box]:
    width, height = picture.size
    longer = size * max(width, height) // min(width, height)
    new_width, new_height = (longer, size) if width >= height else (size, longer)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    box = (
        left * width / new_width,
        top * height / new_height,
        (left + size) * width / new_width,
        (top + size) * height / new_height,
    )
    if new_width * new_height <= _WHOLE_PIXELS:
        return _bicubic(picture, new_width, new_height).crop((left, top, left + size, top + size)), box
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box), box


def _edges(low: NDArray[np.float64], high: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    """float64 (V, cells + 1): the borders of `cells` equal cells between low and high (V), multiplied by `cells`.

    Not divided, so that whole-pixel boxes have exact borders and comparing them rounds nothing.
    """
    steps = np.arange(cells + 1, dtype=np.float64)
    return low[:, None] * (cells - steps) + high[:, None] * steps


def _boxes(view_boxes: ArrayLike) -> NDArray[np.float64]:
    boxes = np.asarray(view_boxes, dtype=np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"view boxes are (V, 4), not {boxes.shape}")
    return boxes


def position_boxes(view_boxes: ArrayLike, grid: tuple[int, int]) -> NDArray[np.float32]:
    """The box of every position in source pixels.

    view_boxes: (V, 4) as `make_views` returns them; grid: (rows, columns). Each view box is divided into equal cells.
    Returns float32 (V * rows * columns, 4) of x0, y0, x1, y1, row-major by view, row, column: the order of the codes.
    """
    rows, columns = grid
    boxes_V4 = _boxes(view_boxes)
    x = _edges(boxes_V4[:, 0], boxes_V4[:, 2], columns) / columns
    y = _edges(boxes_V4[:, 1], boxes_V4[:, 3], rows) / rows
    cells = np.empty((len(boxes_V4), rows, columns, 4), dtype=np.float32)
    cells[..., 0], cells[..., 2] = x[:, None, :-1], x[:, None, 1:]
    cells[..., 1], cells[..., 3] = y[:, :-1, None], y[:, 1:, None]
    return cells.reshape(-1, 4)


def content_mask(view_boxes: ArrayLike, grid: tuple[int, int], width: int, height: int) -> NDArray[np.bool_]:
    """Which positions show any of the picture; the others are padding cells, which no loss may count.

    view_boxes: (V, 4); width, height: the image in pixels. Returns bool (V * rows * columns,), in the order of
    `position_boxes`: True where the cell and the picture [0, width) x [0, height) share an area above zero. Exact for
    boxes in whole pixels (squash, pad); a box of `crop` lies inside the picture, so that every position counts; the
    tiles of `anyres` have fractional boxes, in which a share as thin as the rounding of float32 is none.
    """
    rows, columns = grid
    boxes_V4 = _boxes(view_boxes)
    x = _edges(boxes_V4[:, 0], boxes_V4[:, 2], columns)
    y = _edges(boxes_V4[:, 1], boxes_V4[:, 3], rows)
    whole = (boxes_V4 == np.floor(boxes_V4)).all(axis=1, keepdims=True)
    rounding = np.where(whole, 0.0, np.abs(boxes_V4).max(axis=1, keepdims=True) * 2.0**-23)
    inside_x = (x[:, 1:] > rounding * columns) & (x[:, :-1] < (width - rounding) * columns)
    inside_y = (y[:, 1:] > rounding * rows) & (y[:, :-1] < (height - rounding) * rows)
    return np.asarray(inside_y[:, :, None] & inside_x[:, None, :]).reshape(-1)


def background_from_mean(mean: Sequence[float]) -> tuple[int, int, int]:
    """The bar colour that LLaVA derives from an encoder's `image_mean`: int(255 * channel), not rounded."""
    red, green, blue = (int(255 * channel) for channel in mean)
    return red, green, blue


def _probe_image(width: int, height: int) -> NDArray[np.uint8]:
    """A fixed synthetic picture with ramps, edges and noise: uint8 (height, width, 3), integer arithmetic only."""
    y, x = np.mgrid[:height, :width].astype(np.uint32)
    noise = (x * 73_856_093 ^ y * 19_349_663) * np.uint32(2_654_435_761) >> 24
    checks = (x // 5 + y // 7) % 2 * 255
    return np.stack([noise, checks, (x * 3 + y * 5) % 256], axis=-1).astype(np.uint8)


@lru_cache(maxsize=64)
def probe_sha256(geometry: Geometry) -> str:
    """sha256 of the views of a wide, a tall and a small fixed picture.

    Stands in the fingerprint for the version of Pillow: an upgrade that changes no pixel leaves it as it was.
    """
    digest = hashlib.sha256()
    for width, height in ((1_003, 611), (389, 1_201), (53, 37)):
        views, boxes = make_views(_probe_image(width, height), geometry)
        digest.update(views.tobytes())
        digest.update(boxes.astype("<f4").tobytes())
    return digest.hexdigest()


def geometry_keys(geometry: Geometry) -> dict[str, Any]:
    """What the pixels of a view depend on besides the file, for the fingerprint.

    The background is in it for `pad` and `anyres` only: in the other modes it colours nothing.
    """
    keys: dict[str, Any] = {
        "mode": geometry.mode,
        "size": geometry.size,
        "version": GEOMETRY_VERSION,
        "decode": dict(POLICY),
        "probe_sha256": probe_sha256(geometry),
    }
    if geometry.mode in ("pad", "anyres"):
        keys["background"] = list(geometry.background)
    if geometry.mode == "anyres":
        keys["grid_pinpoints"] = [list(pinpoint) for pinpoint in geometry.grid_pinpoints]
    return keys
