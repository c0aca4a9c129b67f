"""The tower's features are Hugging Face's, without running what is above them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from manifests.errors import InputError
from train_stage import tower as towers

TOWERS = ("siglip", "clip", "dinov2", "vit")
VIEW = 28


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("layer", [-5, -2, -1, 0, 2, 4])
def test_features_equal_hidden_states(tiny_folders: Path, kind: str, layer: int) -> None:
    tower, _ = towers.load_tower(str(tiny_folders / kind), torch.float32)
    pixels = torch.randn(2, 3, VIEW, VIEW)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states[layer]
        torch.testing.assert_close(towers.features(tower, pixels, [layer])[layer], expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", TOWERS)
def test_blocks_above_the_layer_are_not_run(tiny_folders: Path, kind: str) -> None:
    tower, _ = towers.load_tower(str(tiny_folders / kind), torch.float32)
    ran: list[int] = []
    for number, block in enumerate(tower.get_submodule(towers.layout_of(tower.config).blocks)):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    towers.features(tower, torch.randn(1, 3, VIEW, VIEW), [-2])
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("kind", TOWERS)
def test_patches_are_one_per_grid_cell(tiny_folders: Path, kind: str) -> None:
    tower, _ = towers.load_tower(str(tiny_folders / kind), torch.float32)
    rows, columns = towers.tower_grid(tower.config, VIEW)
    patches = towers.patch_features(tower, torch.randn(1, 3, VIEW, VIEW), [-2])[-2]
    assert patches.shape == (1, rows * columns, 32)
    assert (rows, columns) == (4, 4)


def test_pixels_are_those_of_the_image_processor(tiny_folders: Path) -> None:
    _, norm = towers.load_tower(str(tiny_folders / "clip"), torch.float32)
    view = np.random.default_rng(0).integers(0, 256, (VIEW, VIEW, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(tiny_folders / "clip", backend="pil")
    expected = processor(Image.fromarray(view), do_resize=False, do_center_crop=False, return_tensors="pt")
    torch.testing.assert_close(norm(torch.from_numpy(view)[None]), expected["pixel_values"], rtol=0, atol=1e-6)


def test_only_towers_that_resize_positions_take_other_sizes(tiny_folders: Path) -> None:
    dinov2, _ = towers.load_tower(str(tiny_folders / "dinov2"), torch.float32)
    assert towers.tower_grid(dinov2.config, 35) == (5, 5)
    clip, _ = towers.load_tower(str(tiny_folders / "clip"), torch.float32)
    with pytest.raises(InputError, match=r"set geometry\.size to 28"):
        towers.tower_grid(clip.config, 35)


@pytest.mark.parametrize("layer", [5, -6])
def test_a_layer_that_is_not_there_is_named(layer: int) -> None:
    with pytest.raises(InputError, match="hidden states 0 to 4"):
        towers.resolve_layer(layer, 4)


def test_missing_weights_are_an_error_and_not_random_numbers(tiny_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folders / "siglip", tmp_path / "tower")
    weights = load_file(tmp_path / "tower" / "model.safetensors")
    dropped = next(name for name in weights if "layers.1.mlp.fc1.weight" in name)
    save_file({k: v for k, v in weights.items() if k != dropped}, tmp_path / "tower" / "model.safetensors")
    with pytest.raises(InputError, match="lacks 1 weights"):
        towers.load_tower(str(tmp_path / "tower"), torch.float32)


def test_an_unknown_tower_and_a_missing_folder_are_one_sentence(tiny_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no vision tower can be read"):
        towers.load_tower(str(tmp_path / "nowhere"), torch.float32)
    shutil.copytree(tiny_folders / "vit", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "beit"}))
    with pytest.raises(InputError, match="clip_vision_model, dinov2, siglip_vision_model, vit"):
        towers.load_tower(str(tmp_path / "other"), torch.float32)
