"""anyres is LLaVA-NeXT's tiling: the pixels, the choice of the grid, and the order of its positions are transformers'."""

from __future__ import annotations

import resource
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, get_anyres_image_grid_shape, unpad_image

from manifests.anyres import NEWLINE, anyres_layout, anyres_order, most_views, tiling
from manifests.geometry import content_mask, geometry_keys, make_views, position_boxes, probe_sha256
from manifests.schema import Geometry

SIZE = 42
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
ONEVISION = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))

SHAPES = [
    (640, 480), (480, 640), (500, 375), (1, 1), (7, 5), (336, 336), (672, 336), (84, 42), (42, 126), (43, 127),
    (1024, 1024), (1000, 999), (999, 1000), (1920, 1080), (1080, 1920), (333, 1000), (1000, 333), (900, 299),
    (2, 2000), (2000, 2), (1, 1000), (1000, 1), (1, 20_000), (20_000, 1), (20, 20_000), (20_000, 21), (61, 57),
]  # fmt: skip


def anyres(size: int = SIZE, grids: tuple[tuple[int, int], ...] = GRIDS, **changes: Any) -> Geometry:
    pinpoints = [[rows * size, columns * size] for rows, columns in grids]
    values = {"mode": "anyres", "size": size, "background": (0, 0, 0), "grid_pinpoints": pinpoints}
    return Geometry.model_validate({**values, **changes})


def noise(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(width * 7 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("grids", [GRIDS, ONEVISION])
@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_views_are_the_pixels_of_llava_next(width: int, height: int, grids: tuple[tuple[int, int], ...]) -> None:
    geometry = anyres(grids=grids)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=[list(pinpoint) for pinpoint in geometry.grid_pinpoints],
        do_rescale=False,
        do_normalize=False,
    )
    image = noise(width, height)
    expected = processor(Image.fromarray(image), input_data_format="channels_last")["pixel_values"][0]
    views, boxes = make_views(image, geometry)
    assert np.array_equal(views, np.asarray(expected).transpose(0, 2, 3, 1))
    assert boxes.shape == (len(views), 4)
    assert len(views) <= most_views(geometry)
    assert boxes[0].tolist() == [0, 0, width, height]


def test_the_background_fills_what_the_picture_leaves() -> None:
    views, boxes = make_views(noise(400, 100), anyres(grids=((2, 2),), background=(9, 8, 7)))
    bars = ~content_mask(boxes, (SIZE, SIZE), 400, 100).reshape(-1, SIZE, SIZE)
    assert bars[1:].mean() == pytest.approx(0.75, abs=0.03)
    assert (views[bars] == [9, 8, 7]).all()
    assert not (views[~bars] == [9, 8, 7]).all(axis=-1).any()


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([GRIDS, ONEVISION]))
@settings(max_examples=300)
def test_the_grid_is_the_one_that_llava_next_chooses(
    width: int, height: int, grids: tuple[tuple[int, int], ...]
) -> None:
    geometry = anyres(grids=grids)
    layout = anyres_layout(width, height, geometry, (3, 3))
    pinpoints = [list(pinpoint) for pinpoint in geometry.grid_pinpoints]
    assert (layout.rows, layout.columns) == get_anyres_image_grid_shape((height, width), pinpoints, SIZE)
    joined = torch.arange(layout.rows * layout.columns * 9).reshape(1, layout.rows * 3, layout.columns * 3)
    kept = joined[:, layout.top : layout.bottom, layout.left : layout.right]
    assert torch.equal(kept, unpad_image(joined, (height, width)))


@pytest.fixture(scope="module")
def model() -> LlavaNextModel:
    tower = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=SIZE, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=8,
    )  # fmt: skip
    pinpoints = [list(pinpoint) for pinpoint in anyres().grid_pinpoints]
    return LlavaNextModel(LlavaNextConfig(vision_config=tower, text_config=text, image_grid_pinpoints=pinpoints))


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_positions_stand_in_the_order_of_llava_next_features(model: LlavaNextModel, width: int, height: int) -> None:
    views, _ = make_views(noise(width, height), anyres())
    numbers = torch.arange(len(views) * 9, dtype=torch.float64).reshape(len(views), 9, 1)
    newline = torch.tensor([float(NEWLINE)], dtype=torch.float64)
    [expected], _ = model.pack_image_features([numbers], torch.tensor([[height, width]]), "default", newline)
    assert anyres_order(width, height, anyres(), (3, 3)).tolist() == expected[:, 0].tolist()


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 27), st.integers(1, 27))
@settings(max_examples=200)
def test_content_mask_knows_every_padding_cell(width: int, height: int, rows: int, columns: int) -> None:
    """Judged on the canvas, in whole numbers, where the picture was pasted."""
    geometry = anyres(size=24)
    tiles = tiling(width, height, geometry)
    _, boxes = make_views(np.zeros((height, width, 3), np.uint8), geometry)

    def shows(cell: int, cells: int, first: int, length: int) -> bool:
        low, high = Fraction(24 * cell, cells), Fraction(24 * (cell + 1), cells)
        return low < first + length and high > first

    expected = [[[True] * columns] * rows] + [
        [
            [
                shows(tile_row * rows + row, rows, tiles.top, tiles.height)
                and shows(tile_column * columns + column, columns, tiles.left, tiles.width)
                for column in range(columns)
            ]
            for row in range(rows)
        ]
        for tile_row in range(tiles.rows)
        for tile_column in range(tiles.columns)
    ]
    assert content_mask(boxes, (rows, columns), width, height).tolist() == np.ravel(expected).tolist()


@pytest.mark.parametrize(("width", "height"), [(240, 240), (300, 170), (120, 250), (90, 240)])
def test_a_tile_shows_what_its_box_says(width: int, height: int) -> None:
    """Red is x, green is y: the mean of a cell of a view is the centre of the cell's box in source pixels."""
    y, x = np.mgrid[:height, :width] * 0.8
    image = np.stack([x, y, np.full_like(x, 255)], axis=-1).astype(np.uint8)
    views, boxes = make_views(image, anyres())
    cells = position_boxes(boxes, (3, 3)).reshape(-1, 4)
    means = views.reshape(-1, 3, 14, 3, 14, 3).mean(axis=(2, 4)).reshape(-1, 3)
    inside = (cells[:, :2] > 12).all(axis=1) & (cells[:, 2] < width - 12) & (cells[:, 3] < height - 12)
    assert inside.sum() > 5
    centres = (cells[:, :2] + cells[:, 2:]) / 2
    assert np.abs(means[inside, :2] - (centres[inside] - 0.5) * 0.8 + 0.5).max() < 1.5


@pytest.mark.parametrize(("width", "height"), [(1, 65_535), (65_535, 1), (70, 65_535)])
def test_strips_need_no_extreme_memory(width: int, height: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    make_views(noise(width, height), anyres(size=336))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_fingerprint_keys_hold_the_pinpoints_and_their_order() -> None:
    base, other = anyres(), anyres(grids=GRIDS[::-1])
    assert geometry_keys(base)["grid_pinpoints"] == [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]
    assert geometry_keys(base) != geometry_keys(other)
    assert probe_sha256(base) != probe_sha256(anyres(grids=((1, 1),)))
    assert geometry_keys(base) != geometry_keys(anyres(background=(1, 1, 1)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"grid_pinpoints": [[42, 85]]}, "not a multiple of size 42"),
        ({"grid_pinpoints": []}, "at least one"),
        ({"grid_pinpoints": [[42 * 9, 42 * 9]]}, "more than 64 tiles"),
        ({"mode": "pad"}, "belong to anyres"),
    ],
)
def test_pinpoints_that_make_no_grid_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        anyres(**changes)
