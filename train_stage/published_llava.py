"""A published LLaVA or LLaVA-NeXT folder taken apart, so that training goes on from all of its parts.

The folder is in Transformers' form (llava-hf); what an earlier export of ours wrote is one too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from manifests.errors import InputError
from train_stage import tower

CLASSES = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
"""The kinds of folder that can be taken apart, by the model_type of their config.json."""


@dataclass(frozen=True)
class PublishedLlava:
    """The parts of a LLaVA; the language model with its output layer, and `newline` (H,) of a LLaVA-NeXT."""

    config: PreTrainedConfig
    language_model: PreTrainedModel
    vision_tower: PreTrainedModel
    pixel_norm: tower.PixelNorm
    projector: nn.Module
    newline: nn.Parameter | None

    def check(self, location: str, *, image_token_id: int, vision_feature_layer: int) -> None:
        """InputError where training would not go on from what the folder's model computes."""
        config = self.config
        if config.vision_feature_layer != vision_feature_layer:
            raise InputError(
                f"the LLaVA in {location} reads layer {config.vision_feature_layer} of its tower and "
                f"model.vision_feature_layer is {vision_feature_layer}: give it the folder's, which must be one layer"
            )
        if config.image_token_id != image_token_id:
            raise InputError(
                f"the LLaVA in {location} marks an image with token {config.image_token_id}, but the tokenizer has "
                f"{image_token_id} for model.image_token: set that to the folder's own"
            )
        strategy = tower.select_strategy(self.vision_tower.config)
        form = (config.vision_feature_select_strategy, config.projector_hidden_act, config.multimodal_projector_bias)
        if form != (strategy, "gelu", True):
            raise InputError(
                f"the LLaVA in {location} selects features or projects them in another way than a two-layer GELU "
                f"projector of all {'patches' if strategy == 'default' else 'tokens'}, which is all that is trained here"
            )


def load_llava(location: str, dtype: torch.dtype) -> PublishedLlava:
    """The parts of the LLaVA in a folder or hub id, and its normalisation of pixels.

    Raises InputError: nothing usable there, another kind of model, or weights missing from its files.
    """
    try:
        config = AutoConfig.from_pretrained(location)
        if config.model_type not in CLASSES:
            raise InputError(
                f"model.llava is a {config.model_type} in {location}; give a {' or '.join(CLASSES)} in Transformers' form"
            )
        layout = tower.layout_of(config.vision_config)
        llava, info = CLASSES[config.model_type].from_pretrained(location, dtype=dtype, output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(location, backend="pil")
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(
            f"no LLaVA can be read from {location} ({first_line}); model.llava is a folder or hub id with config.json, "
            "weights, tokenizer and preprocessor_config.json"
        ) from error
    unused = tuple(f"model.vision_tower.{name}" for name in layout.unused)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(unused))
    if missing:
        raise InputError(
            f"the LLaVA in {location} lacks {len(missing)} weights, the first of them {missing[0]}; training on random "
            "ones would go unnoticed, so repair the folder"
        )
    return PublishedLlava(
        config=config,
        language_model=causal_language_model(llava),
        vision_tower=llava.model.vision_tower,
        pixel_norm=tower.PixelNorm(tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std))),
        projector=llava.model.multi_modal_projector,
        newline=getattr(llava.model, "image_newline", None),
    )


def causal_language_model(llava: PreTrainedModel) -> PreTrainedModel:
    """The language model of a LLaVA as the causal language model that it was made of; nothing is copied."""
    text_config = llava.config.text_config
    text_config.tie_word_embeddings = llava.config.tie_word_embeddings
    with torch.device("meta"):  # the shell alone
        causal = AutoModelForCausalLM.from_config(text_config)
    setattr(causal, causal.base_model_prefix, llava.model.language_model)
    causal.set_output_embeddings(llava.lm_head)
    return causal
