"""The model of a phase on the meta device: its shapes without its weights, from configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from manifests.errors import InputError
from manifests.schema import Geometry
from train_stage import tower
from train_stage.build import assemble
from train_stage.config import INPUT_CODES, ModelConfig, ResolvedPhase
from train_stage.discrete_input import show_codes
from train_stage.lora import add_adapters
from train_stage.model import AsvrModel
from train_stage.objectives import Surroundings, Target, build_objectives
from train_stage.parts import set_trainable


def read_shape(location: str, what: str) -> PreTrainedConfig:
    """The config.json of a folder or hub id; InputError if there is none. `what` names the recipe's key."""
    try:
        return AutoConfig.from_pretrained(location)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"{what} {location} has no configuration that can be read ({first_line})") from error


def meta_model(
    model: ModelConfig, phase: ResolvedPhase, targets: Mapping[str, Target], geometry: Geometry
) -> AsvrModel:
    """The phase's model without weights, what it trains marked; InputError if its parts do not fit each other.

    `targets`: by the name of a term what its manifests say of them, and of the codes that are shown under `INPUT_CODES`.
    """
    text = read_shape(model.language_model, "model.language_model")
    if model.llava is not None:
        text = text.text_config
    vision = read_shape(model.vision_tower, "model.vision_tower")
    vision_config = getattr(vision, "vision_config", vision)
    tower.layout_of(vision_config)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(text)
        full = tower.FULL_MODELS.get(vision.model_type)
        made_tower = full(vision_config) if full else AutoModel.from_config(vision_config)
        llava = assemble(
            language_model,
            made_tower,
            image_token_id=0,
            vision_feature_layer=model.vision_feature_layer,
            grid_pinpoints=geometry.grid_pinpoints,
        )
        around = Surroundings(
            hidden_size=text.hidden_size,
            tower_width=vision_config.hidden_size,
            grid=tower.tower_grid(vision_config, geometry.size, several_views=bool(geometry.grid_pinpoints)),
        )
        objectives: nn.ModuleDict = build_objectives(phase.terms, targets, around)
    made = AsvrModel(llava, objectives, tower.PixelNorm((0.5,) * 3, (0.5,) * 3))
    made.reads_features = bool(phase.vision_features)
    if INPUT_CODES in targets:
        with torch.device("meta"):
            show_codes(made, targets[INPUT_CODES], around.grid, seed=0)
    set_trainable(made, set(phase.trainable))
    if phase.lora is not None:
        add_adapters(made, phase.lora, seed=0)
    return made
