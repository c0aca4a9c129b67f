"""The frozen vision tower: its layout, its features without the blocks above them, and its pixel normalisation.

Shapes: V views, S pixels an edge, T tokens of the tower (class token included), C width of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

from manifests.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Where a kind of tower keeps its blocks, and how it numbers its tokens."""

    blocks: str
    class_tokens: int
    norm_before: str | None = None
    resizes_positions: bool = False
    published_prefix: str = ""
    """What the names of a LLaVA's tower weights start with in published files, and not in memory."""
    unused: tuple[str, ...] = ()
    """Weights above the blocks, that no feature depends on; a tower may lack them."""


LAYOUTS: dict[str, Layout] = {
    "siglip_vision_model": Layout(
        "encoder.layers", 0, published_prefix="vision_model.", unused=("head.", "post_layernorm.")
    ),
    "clip_vision_model": Layout(
        "encoder.layers",
        1,
        norm_before="pre_layrnorm",
        published_prefix="vision_model.",
        unused=("post_layernorm.",),
    ),
    "dinov2": Layout("encoder.layer", 1, resizes_positions=True, unused=("layernorm.",)),
    "vit": Layout("layers", 1, unused=("pooler.", "layernorm.")),
}

FULL_MODELS: dict[str, type[PreTrainedModel]] = {"siglip": SiglipVisionModel, "clip": CLIPVisionModel}
"""Image-text models of which only the vision half is loaded."""


@dataclass(frozen=True)
class PixelNorm:
    """(x / 255 - mean) / std per channel, as the tower's image processor has it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, views: Tensor) -> Tensor:
        """uint8 (V, S, S, 3) -> float32 (V, 3, S, S), on the device of `views`."""
        mean = torch.tensor(self.mean, device=views.device)
        std = torch.tensor(self.std, device=views.device)
        return ((views.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def layout_of(config: PreTrainedConfig) -> Layout:
    """The layout of a tower; InputError names the kinds there are."""
    try:
        return LAYOUTS[config.model_type]
    except KeyError:
        known = ", ".join(sorted(LAYOUTS))
        raise InputError(f"model.vision_tower is a {config.model_type}; the towers known here are {known}") from None


def load_tower(location: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PixelNorm]:
    """The tower of a folder or hub id, and the normalisation its preprocessor_config.json states.

    Raises:
        InputError: nothing usable there, a kind that is not in `LAYOUTS`, or weights missing from the file.
    """
    layout = layout_of(read_tower_config(location))
    try:
        config = AutoConfig.from_pretrained(location)
        model_class = FULL_MODELS.get(config.model_type, AutoModel)
        tower, info = model_class.from_pretrained(location, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise _no_tower(location, error) from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(layout.unused))
    if missing:
        raise InputError(
            f"the vision tower in {location} lacks {len(missing)} weights, the first of them {missing[0]}; "
            "training on random ones would go unnoticed, so repair the folder"
        )
    return tower, read_pixel_norm(location)


def read_pixel_norm(location: str) -> PixelNorm:
    """The normalisation that a tower's preprocessor_config.json states; InputError as `load_tower`."""
    try:
        processor = AutoImageProcessor.from_pretrained(location, backend="pil")
    except (OSError, ValueError) as error:
        raise _no_tower(location, error) from error
    return PixelNorm(tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std)))


def read_tower_config(location: str) -> PreTrainedConfig:
    """The configuration of a tower alone; InputError as `load_tower`."""
    try:
        config = AutoConfig.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise _no_tower(location, error) from error
    tower_config: PreTrainedConfig = getattr(config, "vision_config", config)
    layout_of(tower_config)
    return tower_config


def _no_tower(location: str, error: Exception) -> InputError:
    first_line = str(error).strip().splitlines()[0]
    return InputError(
        f"no vision tower can be read from {location} ({first_line}); model.vision_tower is a folder or hub id "
        "with config.json, weights and preprocessor_config.json"
    )


def select_strategy(config: PreTrainedConfig) -> str:
    """LLaVA's `vision_feature_select_strategy`: "default" drops the class token, "full" keeps all there are."""
    return "default" if layout_of(config).class_tokens else "full"


def tower_grid(config: PreTrainedConfig, view_size: int, *, several_views: bool = False) -> tuple[int, int]:
    """(rows, columns) of features that a view of `view_size` pixels gives; InputError if the tower cannot take it.

    A LLaVA-NeXT (`several_views`) takes views of the tower's own size only: Transformers computes the tiles from it.
    """
    if view_size != config.image_size and (several_views or not layout_of(config).resizes_positions):
        raise InputError(
            f"the geometry makes views of {view_size} pixels but the vision tower takes {config.image_size}; "
            f"set geometry.size to {config.image_size}"
        )
    side = view_size // config.patch_size
    return side, side


def features(tower: PreTrainedModel, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """hidden_states[layer] of the tower (V, T, C) for float pixels (V, 3, S, S), by layer.

    hidden_states[k] is the input of block k, so the blocks above the highest layer, the final norm and the pooling are
    not run: with LLaVA's layer -2 that spares one block and the pooling head. In all kinds of `LAYOUTS` the last
    hidden state is the last block's own output, before the final norm.
    """
    layout = layout_of(tower.config)
    blocks = cast("nn.ModuleList", tower.get_submodule(layout.blocks))
    wanted = {layer: resolve_layer(layer, len(blocks)) for layer in layers}
    x = tower.get_submodule("embeddings")(pixels.to(tower.dtype))
    if layout.norm_before is not None:
        x = tower.get_submodule(layout.norm_before)(x)
    kept = {0: x}
    for count, block in enumerate(blocks[: max(wanted.values())], start=1):
        x = block(x, None)
        if count in wanted.values():
            kept[count] = x
    return {layer: kept[count] for layer, count in wanted.items()}


def patch_features(tower: PreTrainedModel, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """`features` without the class token: (V, P, C), in raster order of the patch grid."""
    first = layout_of(tower.config).class_tokens
    return {layer: state[:, first:] for layer, state in features(tower, pixels, layers).items()}


def resolve_layer(layer: int, blocks: int) -> int:
    """Index into hidden_states (blocks + 1 of them) as a count of blocks to run; InputError when out of range."""
    if not -(blocks + 1) <= layer <= blocks:
        raise InputError(f"model.vision_feature_layer is {layer} but the tower has hidden states 0 to {blocks}")
    return layer % (blocks + 1)
