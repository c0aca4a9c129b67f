"""Tiny random vision encoders of the families people use, saved the way transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

BLOCKS = 4
PATCH = 7
SIZE = 28
WIDTH = 32

FAMILIES = ["dinov2", "dinov2_registers", "siglip", "siglip_two_towers", "clip", "clip_two_towers", "vit"]

_VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIZE,
    "patch_size": PATCH,
}
_TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
}
_DINO = {**_VISION, "mlp_ratio": 2}
MEAN = [0.48, 0.46, 0.41]
STD = [0.27, 0.26, 0.28]


def build(family: str, **changes: Any) -> nn.Module:
    """A random model of a family; `changes` go into its vision configuration."""
    torch.manual_seed(1)
    vision = {**_VISION, **changes}
    models: dict[str, Any] = {
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**{**_DINO, **changes})),
        "dinov2_registers": lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**{**_DINO, **changes})
        ),
        "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision)),
        "siglip_two_towers": lambda: transformers.SiglipModel(
            transformers.SiglipConfig(text_config=_TEXT, vision_config=vision)
        ),
        "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)),
        "clip_two_towers": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config=_TEXT, vision_config=vision, projection_dim=16)
        ),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**vision)),
        "vit_classifier": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**vision)),
    }
    model: nn.Module = models[family]()
    return model.eval()


def save(model: Any, folder: Path) -> Path:
    """Write a model and its preprocessor's settings."""
    model.save_pretrained(folder)
    settings = {
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def all_hidden_states(model: Any, views_BSSC: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What transformers itself calls `hidden_states`, from the whole model, normalised in the plainest way."""
    vision = getattr(model, "vision_model", model)
    pixels = views_BSSC.permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    arguments = {"interpolate_pos_encoding": True} if views_BSSC.shape[1] != vision.config.image_size else {}
    if "dinov2" in vision.config.model_type:
        arguments = {}
    with torch.no_grad():
        states: tuple[torch.Tensor, ...] = vision(pixels, output_hidden_states=True, **arguments).hidden_states
    return states
