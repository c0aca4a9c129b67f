"""Geometry: views are Pillow's pixels, and boxes say where each came from."""

from __future__ import annotations

import resource
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from manifests.fingerprint import fingerprint
from manifests.geometry import (
    background_from_mean,
    content_mask,
    geometry_keys,
    make_views,
    position_boxes,
    probe_sha256,
)
from manifests.schema import Geometry

MODES = ("squash", "pad", "crop")
sides = st.integers(1, 150)
sizes = st.integers(1, 70)
colours = st.tuples(*[st.integers(0, 255)] * 3)


def noise(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def bicubic(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), resample=Image.Resampling.BICUBIC)


def expand2square(pil_img: Image.Image, background_color: tuple[int, int, int]) -> Image.Image:
    """LLaVA's definition, written from its description: the picture in the middle of a square, rounding up-left."""
    width, height = pil_img.size
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, (0, (width - height) // 2) if width > height else ((height - width) // 2, 0))
    return square


def clip_crop(image: Image.Image, size: int) -> Image.Image:
    """CLIP's preprocessing: shorter edge to `size`, then the centre."""
    short, long = sorted(image.size)
    resized = int(size * long / short)
    width, height = (size, resized) if image.width <= image.height else (resized, size)
    left, top = (width - size) // 2, (height - size) // 2
    return bicubic(image, width, height).crop((left, top, left + size, top + size))


@given(sides, sides, sizes)
def test_squash_is_pillows_bicubic_resize(width: int, height: int, size: int) -> None:
    image = noise(width, height)
    views, boxes = make_views(image, Geometry(mode="squash", size=size))
    assert np.array_equal(views[0], np.asarray(bicubic(Image.fromarray(image), size, size)))
    assert boxes.tolist() == [[0, 0, width, height]]


@given(sides, sides, sizes, colours)
def test_pad_is_llavas_expand2square_then_resize(
    width: int, height: int, size: int, colour: tuple[int, int, int]
) -> None:
    image = noise(width, height)
    views, boxes = make_views(image, Geometry(mode="pad", size=size, background=colour))
    assert np.array_equal(views[0], np.asarray(bicubic(expand2square(Image.fromarray(image), colour), size, size)))
    x0, y0, x1, y1 = boxes[0].tolist()
    assert x1 - x0 == y1 - y0 == max(width, height)
    assert (-x0, -y0) == ((0, (width - height) // 2) if width > height else ((height - width) // 2, 0))


@given(sides, sides, sizes)
def test_crop_is_clips(width: int, height: int, size: int) -> None:
    image = noise(width, height)
    views, boxes = make_views(image, Geometry(mode="crop", size=size))
    assert np.array_equal(views[0], np.asarray(clip_crop(Image.fromarray(image), size)))
    x0, y0, x1, y1 = boxes[0].tolist()
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    assert min(width, height) == pytest.approx(min(x1 - x0, y1 - y0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("width", "height"), [(1, 1000), (1000, 1), (3, 2999), (2999, 3), (701, 6001)])
def test_extreme_shapes_equal_the_plain_definition(mode: str, width: int, height: int) -> None:
    image, size, colour = noise(width, height), 24, (122, 116, 104)
    views, _ = make_views(image, Geometry.model_validate({"mode": mode, "size": size, "background": colour}))
    picture = Image.fromarray(image)
    expected = {
        "squash": lambda: bicubic(picture, size, size),
        "pad": lambda: bicubic(expand2square(picture, colour), size, size),
        "crop": lambda: clip_crop(picture, size),
    }[mode]()
    assert np.array_equal(views[0], np.asarray(expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("width", "height"), [(20, 20_000), (20_000, 20)])
def test_extreme_shapes_need_no_extreme_memory(mode: str, width: int, height: int) -> None:
    # The padded square would take 1.6 GB, the uncropped picture 570 MB.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    make_views(noise(width, height), Geometry.model_validate({"mode": mode, "size": 384}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB


@given(st.integers(30, 200), st.integers(30, 200), st.integers(16, 64), st.sampled_from(MODES), st.integers(2, 6))
def test_pixels_that_carry_their_coordinates_land_where_the_boxes_say(
    width: int, height: int, size: int, mode: str, cells: int
) -> None:
    """Red is x, green is y (+ 20), blue marks the picture: the mean of a cell of the view is the centre of its box."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x + 20, y + 20, np.full_like(x, 255)], axis=-1).astype(np.uint8)
    size -= size % cells
    views, boxes = make_views(image, Geometry.model_validate({"mode": mode, "size": size, "background": (0, 0, 0)}))
    assert views.shape == (1, size, size, 3)
    assert views.dtype == np.uint8
    assert boxes.dtype == np.float32
    edge = size // cells
    cells_PEE3 = (
        views[0].reshape(cells, edge, cells, edge, 3).transpose(0, 2, 1, 3, 4).reshape(-1, edge * edge, 3)
    ).astype(float)
    # Bicubic reaches two view pixels (or two source pixels) far; nearer the border the ramp is bent.
    reach = 2 * max(1.0, float(boxes[0, 2] - boxes[0, 0]) / size, float(boxes[0, 3] - boxes[0, 1]) / size) + 1
    inner = 0
    for (x0, y0, x1, y1), cell in zip(position_boxes(boxes, (cells, cells)).tolist(), cells_PEE3, strict=True):
        if x0 >= reach and y0 >= reach and x1 <= width - reach and y1 <= height - reach:
            inner += 1
            assert cell[:, 0].mean() == pytest.approx((x0 + x1) / 2 - 0.5 + 20, abs=0.6)
            assert cell[:, 1].mean() == pytest.approx((y0 + y1) / 2 - 0.5 + 20, abs=0.6)
            assert (cell[:, 2] == 255).all()
        if x1 <= -reach or y1 <= -reach or x0 >= width + reach or y0 >= height + reach:
            assert (cell == 0).all()
    assert inner or mode == "pad" or cells < 4 or reach > 4


def test_position_boxes_tile_their_view_row_by_row() -> None:
    boxes = position_boxes([[0, 0, 6, 4], [-2, -1, 4, 5]], (2, 3))
    assert boxes.shape == (12, 4)
    assert boxes.dtype == np.float32
    assert boxes[:4].tolist() == [[0, 0, 2, 2], [2, 0, 4, 2], [4, 0, 6, 2], [0, 2, 2, 4]]
    assert boxes[6].tolist() == [-2, -1, 0, 2]
    assert boxes[11].tolist() == [2, 2, 4, 5]
    assert position_boxes(np.zeros((0, 4)), (2, 3)).shape == (0, 4)
    with pytest.raises(ValueError, match=r"\(V, 4\)"):
        position_boxes([0, 0, 1, 1], (2, 2))


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 27), st.integers(1, 27))
@settings(max_examples=300)
def test_content_mask_of_pad_is_exact_for_every_aspect_ratio(width: int, height: int, rows: int, columns: int) -> None:
    edge = max(width, height)
    left, top = (edge - width) // 2, (edge - height) // 2
    box = [-left, -top, edge - left, edge - top]

    def shows(cell: int, cells: int, offset: int, length: int) -> bool:
        start, end = Fraction(edge * cell, cells) - offset, Fraction(edge * (cell + 1), cells) - offset
        return min(end, Fraction(length)) > max(start, Fraction(0))

    expected = [
        shows(row, rows, top, height) and shows(column, columns, left, width)
        for row in range(rows)
        for column in range(columns)
    ]
    assert content_mask([box], (rows, columns), width, height).tolist() == expected
    assert content_mask(np.array([box], dtype=np.float32), (rows, columns), width, height).tolist() == expected


@pytest.mark.parametrize("mode", ["squash", "crop"])
@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_every_position_of_squash_and_crop_shows_the_picture(mode: str, width: int, height: int) -> None:
    image = np.zeros((height, width, 3), dtype=np.uint8)
    _, boxes = make_views(image, Geometry.model_validate({"mode": mode, "size": 14}))
    assert content_mask(boxes, (14, 14), width, height).all()


def test_a_crop_too_long_to_be_made_whole_is_within_a_few_levels_of_its_definition() -> None:
    image = noise(3, 1500)  # at size 384 the whole is 384 x 192,000 pixels
    views, _ = make_views(image, Geometry(mode="crop", size=384))
    difference = views[0].astype(int) - np.asarray(clip_crop(Image.fromarray(image), 384))
    assert np.abs(difference).max() <= 6
    assert np.abs(difference).mean() < 0.5


def test_padding_cells_of_a_wide_picture() -> None:
    _, boxes = make_views(noise(400, 100), Geometry(mode="pad", size=8))
    rows = content_mask(boxes, (8, 8), 400, 100).reshape(8, 8)
    assert rows.all(axis=1).tolist() == rows.any(axis=1).tolist() == [False] * 3 + [True] * 2 + [False] * 3


def test_an_array_of_another_kind_is_a_programming_error() -> None:
    geometry = Geometry(mode="pad", size=8)
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="an image is uint8"):
            make_views(wrong, geometry)


def test_views_do_not_depend_on_the_memory_layout_and_are_writable() -> None:
    image = noise(40, 30)
    for mode in MODES:
        geometry = Geometry.model_validate({"mode": mode, "size": 16})
        views, _ = make_views(image[::-1, ::-1], geometry)
        assert np.array_equal(views, make_views(image[::-1, ::-1].copy(), geometry)[0])
        assert views.flags.writeable
        assert views.flags.c_contiguous


def test_background_is_truncated_as_llava_does() -> None:
    assert background_from_mean([0.48145466, 0.4578275, 0.40821073]) == (122, 116, 104)
    assert background_from_mean([0.5, 0.5, 0.5]) == (127, 127, 127)


def test_fingerprint_keys_name_what_decides_a_pixel_and_nothing_else() -> None:
    grey = Geometry(mode="pad", size=32)
    white = grey.model_copy(update={"background": (255, 255, 255)})
    assert geometry_keys(grey) != geometry_keys(white)
    assert geometry_keys(grey)["probe_sha256"] == probe_sha256(grey) == probe_sha256(Geometry(mode="pad", size=32))
    crop = Geometry(mode="crop", size=32)
    assert geometry_keys(crop) == geometry_keys(crop.model_copy(update={"background": (1, 2, 3)}))
    assert len({probe_sha256(Geometry.model_validate({"mode": mode, "size": 32})) for mode in MODES}) == 3


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("squash", "76fa064fcfee9847d69e04724ba7f99f319558c6b303e7ddb1a19484ff1795d5"),
        ("pad", "764c29cb47891a4b4034e950fa623130ae28f17af200ca16ca29551da7c3d15d"),
        ("crop", "2c57c40ef7cf13957a9eff508edc6e5c3962f8b7b42495068ddd3344beb896e6"),
    ],
)
def test_the_probe_is_the_same_on_every_machine(mode: str, expected: str) -> None:
    """Recorded with Pillow 13.0 on x86-64. A change here changes every fingerprint: raise GEOMETRY_VERSION if meant."""
    assert probe_sha256(Geometry.model_validate({"mode": mode, "size": 224})) == expected


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("squash", "9afb3a8a011852cc84f1f6dd99616486415e5e9068fc2d4dae0c5d58e9d4b887"),
        ("pad", "e8d30935bdbfddad41d7307c7278e1dcd375738bd56d63dac004312ea9ef4f71"),
        ("crop", "72a6ba332d64dabf0601b6c46bc79fa0d53f09a4bc5dbe9244b3313e20e5d667"),
    ],
)
def test_fingerprints_of_modes_with_one_view_are_what_they_were_before_anyres(mode: str, expected: str) -> None:
    geometry = Geometry.model_validate({"mode": mode, "size": 224})
    assert fingerprint({"geometry": geometry_keys(geometry)}) == expected
    assert set(geometry.model_dump()) == {"mode", "size", "background"}
