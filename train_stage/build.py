"""The model that a phase trains, made of its parts: language model and tower as they are given, projector and objectives fresh."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from manifests.errors import InputError
from train_stage import config as configs
from train_stage import tower
from train_stage.attention import use_own_attention
from train_stage.model import AsvrModel, Llava, image_newline
from train_stage.objectives import Surroundings, Target, build_objectives
from train_stage.published_llava import load_llava
from train_stage.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 64
"""Rows of a vocabulary that had to grow are padded to a multiple of this, for the tensor cores."""


def build_model(
    model: configs.ModelConfig,
    terms: Sequence[configs.Term],
    targets: Mapping[str, Target],
    dtype: torch.dtype,
    *,
    view_size: int | None = None,
    grid_pinpoints: Sequence[tuple[int, int]] = (),
    seed: int = 0,
) -> AsvrModel:
    """Language model and tower from their folders or hub ids; projector and visual head fresh from `seed`.

    From a LLaVA also the projector, and the newline if it has one and the geometry several views an image.

    Args:
        terms: of the visual loss; none of them for the text loss alone.
        targets: by the name of a term what its manifests say of them.
        view_size: edge of a view in pixels; default: what the tower was made for.
        grid_pinpoints: those of geometry `anyres`, for a LLaVA-NeXT; none: a LLaVA.
        seed: decides the fresh weights, the same on every rank; the caller's generator is left as it was.

    Raises:
        InputError: a folder that cannot be read or lacks weights, or a term that does not fit its manifests.
    """
    # Loading draws random numbers too, for weights that the file then overwrites.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = load_tokenizer(model)
        image_token_id = tokenizer.convert_tokens_to_ids(model.image_token)
        published = None if model.llava is None else load_llava(model.llava, dtype)
        if published is None:
            vision_tower, pixel_norm = tower.load_tower(model.vision_tower, dtype)
            language_model = _load_language_model(model.language_model, dtype)
        else:
            published.check(
                str(model.llava), image_token_id=image_token_id, vision_feature_layer=model.vision_feature_layer
            )
            vision_tower, pixel_norm = published.vision_tower, published.pixel_norm
            language_model = published.language_model
        _grow_vocabulary(language_model, len(tokenizer))
        torch.manual_seed(seed)
        llava = assemble(
            language_model,
            vision_tower,
            image_token_id=image_token_id,
            vision_feature_layer=model.vision_feature_layer,
            grid_pinpoints=grid_pinpoints,
        )
        if published is not None:
            llava.model.multi_modal_projector = published.projector
            if published.newline is not None and image_newline(llava) is not None:
                llava.model.image_newline = published.newline
        around = Surroundings(
            hidden_size=llava.config.text_config.hidden_size,
            tower_width=vision_tower.config.hidden_size,
            grid=tower.tower_grid(
                vision_tower.config, view_size or vision_tower.config.image_size, several_views=bool(grid_pinpoints)
            ),
        )
        _check_layers(terms, llava)
        built = build_objectives(terms, targets, around)
    use_own_attention(llava.model.language_model)
    made = AsvrModel(llava, built, pixel_norm)
    # Parameters only: rotary frequencies and codebook vectors are buffers that lose by rounding.
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return made


def assemble(
    language_model: PreTrainedModel,
    vision_tower: PreTrainedModel,
    *,
    image_token_id: int,
    vision_feature_layer: int,
    grid_pinpoints: Sequence[tuple[int, int]] = (),
) -> Llava:
    """A LLaVA made of the two given models, without copying them, and a fresh two-layer GELU projector.

    With `grid_pinpoints` a LLaVA-NeXT, whose newline vector is fresh too.
    """
    tower.resolve_layer(vision_feature_layer, vision_tower.config.num_hidden_layers)
    settings: dict[str, Any] = {
        "vision_config": vision_tower.config,
        "text_config": language_model.config,
        "image_token_index": image_token_id,
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": tower.select_strategy(vision_tower.config),
        "tie_word_embeddings": language_model.config.tie_word_embeddings,
    }
    llava: Llava
    with torch.device("meta"):  # the shell alone; its parts are put in below
        if grid_pinpoints:
            pinpoints = [list(pinpoint) for pinpoint in grid_pinpoints]
            llava = LlavaNextForConditionalGeneration(LlavaNextConfig(**settings, image_grid_pinpoints=pinpoints))
        else:
            llava = LlavaForConditionalGeneration(LlavaConfig(**settings))
    width_in, width = vision_tower.config.hidden_size, language_model.config.hidden_size
    projector = llava.model.multi_modal_projector
    projector.linear_1, projector.linear_2 = nn.Linear(width_in, width), nn.Linear(width, width)
    llava.model.vision_tower = vision_tower
    llava.model.language_model = language_model.base_model
    llava.lm_head = language_model.get_output_embeddings()
    if isinstance(llava, LlavaNextForConditionalGeneration):
        llava.model.image_newline = nn.Parameter(torch.randn(width) / math.sqrt(width))
    return llava


def _check_layers(terms: Sequence[configs.Term], llava: Llava) -> None:
    blocks = {
        "language_layer": llava.config.text_config.num_hidden_layers,
        "tower_layer": llava.config.vision_config.num_hidden_layers,
    }
    for term in terms:
        for key, count in blocks.items():
            layer = getattr(term, key, None)
            if layer is not None and not -(count + 1) <= layer <= count:
                raise InputError(
                    f"objective {term.name} asks for {key} {layer}, but there are hidden states 0 to {count}"
                )


def _load_language_model(location: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(
            f"no language model can be read from {location} ({first_line}); "
            "model.language_model is a folder or hub id of a causal language model"
        ) from error
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise InputError(
            f"the language model in {location} ({type(model).__name__}) takes no position_ids, by which samples in one row "
            "are kept apart: use one with rotary or learned positions"
        )
    if info["missing_keys"]:
        raise InputError(
            f"the language model in {location} lacks {len(info['missing_keys'])} weights, the first of them "
            f"{min(info['missing_keys'])}; training on random ones would go unnoticed, so repair the folder"
        )
    return model


def _grow_vocabulary(language_model: PreTrainedModel, tokens: int) -> None:
    """Room for tokens that the tokenizer gained; new rows start as the mean of the old ones, the same on every rank."""
    old = language_model.get_input_embeddings().weight.shape[0]
    if tokens <= old:
        return
    language_model.resize_token_embeddings(tokens, pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].float().mean(dim=0).to(layer.weight.dtype)
    log.info("the vocabulary grew from %d to %d rows for the image token", old, layer.weight.shape[0])
