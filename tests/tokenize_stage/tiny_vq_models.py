"""Tiny random image VQ models of the classes transformers ships, alone and inside the model they were made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = ["chameleon", "emu3", "janus", "glm_image"]
STRIDE = 4
CODES = 40
MEAN = [0.5, 0.4, 0.3]
STD = [0.5, 0.6, 0.7]

_VQGAN: dict[str, Any] = {
    "embed_dim": 6,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
}
_TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 60,
}
VQ: dict[str, dict[str, Any]] = {
    "chameleon": {**_VQGAN, "num_embeddings": CODES, "resolution": 16},
    "emu3": {**_VQGAN, "codebook_size": CODES, "attn_resolutions": [2], "hidden_size": 64},
    "janus": {**_VQGAN, "num_embeddings": CODES, "num_patches": 5, "projection_dim": 8, "image_token_embed_dim": 8},
    "glm_image": {"embed_dim": 6, "num_embeddings": CODES, "latent_channels": 16},
}
_VISION: dict[str, dict[str, Any]] = {
    "janus": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 18, "patch_size": 3,
        "projection_dim": 16,
    },
    "glm_image": {
        "hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 24, "image_size": 24, "patch_size": STRIDE,
    },
}  # fmt: skip


def build_alone(family: str) -> Any:
    """The VQ model by itself; GLM-Image's cannot encode an image so."""
    name = {"chameleon": "Chameleon", "emu3": "Emu3", "janus": "Janus", "glm_image": "GlmImage"}[family]
    torch.manual_seed(2)
    config = getattr(transformers, f"{name}VQVAEConfig")(**VQ[family])
    return _spread(getattr(transformers, f"{name}VQVAE")(config))


def build_whole(family: str, **vision: Any) -> Any:
    """The whole model, language model and all."""
    torch.manual_seed(2)
    parts: dict[str, Any] = {"vq_config": VQ[family]}
    if family in _VISION:
        parts["vision_config"] = {**_VISION[family], **vision}
    if family == "chameleon":
        config = transformers.ChameleonConfig(**parts, **_TEXT, vocabulary_map={"<image>": 1, "IMGIMGAZ": 2})
        return _spread(transformers.ChameleonForConditionalGeneration(config))
    if family == "emu3":
        config = transformers.Emu3Config(
            **parts, text_config={**_TEXT, "pad_token_id": 0}, vocabulary_map={"<image>": 1}
        )
        return _spread(transformers.Emu3ForConditionalGeneration(config))
    if family == "janus":
        config = transformers.JanusConfig(**parts, text_config={**_TEXT, "model_type": "llama"})
        return _spread(transformers.JanusForConditionalGeneration(config))
    text = {**_TEXT, "pad_token_id": 0, "eos_token_id": 2, "vision_vocab_size": 60}
    config = transformers.GlmImageConfig(**parts, text_config=text)
    return _spread(transformers.GlmImageForConditionalGeneration(config))


def save(model: Any, folder: Path, **changes: Any) -> Path:
    """Write a model and its preprocessor's settings."""
    model.save_pretrained(folder, **changes)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def pixels(views_BSSC: torch.Tensor) -> torch.Tensor:
    """The views as the models take them, in the plainest way."""
    scaled = views_BSSC.permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def codes_of_transformers(family: str, model: Any, views_BSSC: torch.Tensor) -> torch.Tensor:
    """int64 (B, P) as the public methods of transformers give them. `model`: alone, or (GLM-Image) the whole one."""
    pixels_BCSS = pixels(views_BSSC)
    if family == "emu3":
        size = pixels_BCSS.shape[-1]
        tokens = model.encode(pixels_BCSS, torch.tensor([[size, size]] * len(views_BSSC))).image_tokens
        return torch.stack(list(tokens)).flatten(1)
    if family == "glm_image":
        patches, grids = _packed(pixels_BCSS)
        features = model.model.get_image_features(patches, grids).pooler_output
        packed: torch.Tensor = model.get_image_tokens(features)
        return packed.view(len(views_BSSC), -1)
    codes: torch.Tensor = model.encode(pixels_BCSS).image_tokens
    return codes.view(len(views_BSSC), -1)


def _packed(pixels_BCSS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches row by row, as GLM-Image's image processor packs them, and the grid of each view."""
    corners = range(0, pixels_BCSS.shape[-1], STRIDE)
    rows = [
        view[:, top : top + STRIDE, left : left + STRIDE].reshape(-1)
        for view in pixels_BCSS for top in corners for left in corners
    ]  # fmt: skip
    edge = pixels_BCSS.shape[-1] // STRIDE
    return torch.stack(rows), torch.tensor([[1, edge, edge]] * len(pixels_BCSS))


@torch.no_grad()
def _spread(model: Any) -> Any:
    """Random weights that make many different codes: those of transformers' initialisation are all but zero."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point() and tensor.ndim > 1 and not name.endswith("embedding.weight"):
            tensor.normal_(0, 2 * tensor[0].numel() ** -0.5)
    return model.eval()
