"""The model in training: a Hugging Face LLaVA and the objective beside it.

Shapes: B samples, L tokens, V views, P positions of a view, H width of the language model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from manifests.errors import InputError
from train_stage import config as configs
from train_stage import tower
from train_stage.batch import NO_TOKEN, Batch
from train_stage.losses import LossSums, text_loss
from train_stage.objectives import Objective, build_objective
from train_stage.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 64
"""Rows of a vocabulary that had to grow are padded to a multiple of this, for the tensor cores."""


class AsvrModel(nn.Module):
    """LLaVA plus an objective. `forward` gives the sums of one micro-batch; a step's loss is made of many.

    The parameters keep the names of Hugging Face's classes, so that export renames and never converts.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, objective: Objective, pixel_norm: tower.PixelNorm) -> None:
        super().__init__()
        self.llava = llava
        self.objective = objective
        self.pixel_norm = pixel_norm
        self.vision_tower.requires_grad_(False)

    @property
    def vision_tower(self) -> PreTrainedModel:
        return self.llava.model.vision_tower

    def forward(self, batch: Batch) -> LossSums:
        """Every trainable parameter takes part, whatever the batch holds; see `batch.dummy_view`."""
        hidden_BLH = self.hidden_states(batch)
        text_sum, text_tokens = text_loss(hidden_BLH, batch.labels, self.llava.lm_head)
        visual_sum_D, visual_positions, correct_D = self.objective(hidden_BLH, batch)
        return LossSums(text_sum, text_tokens, visual_sum_D, visual_positions, correct_D)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The language model's last hidden states after its final norm, (B, L, H)."""
        inputs_BLH = self._place(self.llava.get_input_embeddings()(batch.input_ids), batch)
        outputs = self.llava.model.language_model(
            inputs_embeds=inputs_BLH, attention_mask=batch.attention_mask, use_cache=False
        )
        return outputs.last_hidden_state

    def image_features(self, views: Tensor) -> Tensor:
        """Projected patch features (V, P, H) of uint8 views (V, S, S, 3)."""
        with torch.no_grad():
            pixels = self.pixel_norm(views)
            patches = tower.patch_features(self.vision_tower, pixels, self.llava.config.vision_feature_layer)
        return self.llava.model.multi_modal_projector(patches)

    def train(self, mode: bool = True) -> AsvrModel:
        """As usual, but the tower stays in evaluation mode: it is frozen, so it drops nothing out."""
        super().train(mode)
        self.vision_tower.eval()
        return self

    def _place(self, embeds_BLH: Tensor, batch: Batch) -> Tensor:
        """Token embeddings with the projected features of each view written over its image tokens."""
        features_VPH = self.image_features(batch.views).to(embeds_BLH.dtype)
        flat = embeds_BLH.flatten(0, 1)
        # Features without a token go to one extra row that is then cut off: no branch, and the projector is in the
        # graph of every micro-batch.
        rows = len(flat)
        target = torch.where(batch.view_position == NO_TOKEN, rows, batch.view_position).flatten()
        padded = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
        return padded.index_copy(0, target, features_VPH.flatten(0, 1))[:rows].view_as(embeds_BLH)


def build_model(
    model: configs.ModelConfig,
    objective: configs.CodesObjective | configs.NoneObjective,
    codebooks: Sequence[np.ndarray] | None,
    dtype: torch.dtype,
    *,
    residual: bool = True,
    seed: int = 0,
) -> AsvrModel:
    """Language model and tower from their folders or hub ids; projector and visual head fresh from `seed`.

    Args:
        codebooks: D float32 arrays (K_d, C), needed by objective `codes`.
        residual: `TokenizerSpec.residual` of the manifest the codebooks come from.
        seed: decides the fresh weights, the same on every rank; the caller's generator is left as it was.

    Raises:
        InputError: a folder that cannot be read or lacks weights.
    """
    # Loading draws random numbers too, for weights that the file then overwrites.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision_tower, pixel_norm = tower.load_tower(model.vision_tower, dtype)
        tokenizer = load_tokenizer(model)
        language_model = _load_language_model(model.language_model, dtype)
        _grow_vocabulary(language_model, len(tokenizer))
        torch.manual_seed(seed)
        llava = assemble(
            language_model,
            vision_tower,
            image_token_id=tokenizer.convert_tokens_to_ids(model.image_token),
            vision_feature_layer=model.vision_feature_layer,
        )
        built = build_objective(objective, llava.config.text_config.hidden_size, codebooks, residual=residual)
    made = AsvrModel(llava, built, pixel_norm)
    # Parameters only: rotary frequencies and codebook vectors are buffers that lose by rounding.
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return made


def assemble(
    language_model: PreTrainedModel, vision_tower: PreTrainedModel, *, image_token_id: int, vision_feature_layer: int
) -> LlavaForConditionalGeneration:
    """A LLaVA made of the two given models, without copying them, and a fresh two-layer GELU projector."""
    tower.resolve_layer(vision_feature_layer, vision_tower.config.num_hidden_layers)
    config = LlavaConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_index=image_token_id,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=tower.select_strategy(vision_tower.config),
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    with torch.device("meta"):  # the shell alone; its three parts are put in below
        llava = LlavaForConditionalGeneration(config)
    width_in, width = vision_tower.config.hidden_size, language_model.config.hidden_size
    projector = llava.model.multi_modal_projector
    projector.linear_1, projector.linear_2 = nn.Linear(width_in, width), nn.Linear(width, width)
    llava.model.vision_tower = vision_tower
    llava.model.language_model = language_model.base_model
    llava.lm_head = language_model.get_output_embeddings()
    return llava


def set_trainable(model: AsvrModel, parts: Set[str]) -> None:
    """Train exactly `parts` of projector, visual_head, language_model, and say so line by line.

    The vision tower is always frozen. A part that the objective does not have is stated and passed over.
    """
    modules = part_modules(model)
    unknown = sorted(parts - modules.keys())
    if unknown:
        raise ValueError(f"no trainable part is called {unknown[0]}; there are {', '.join(modules)}")
    for name, members in {"vision_tower": [model.vision_tower], **modules}.items():
        # By identity, since a tied output layer belongs to two modules.
        parameters = {id(p): p for member in members for p in member.parameters()}.values()
        for parameter in parameters:
            parameter.requires_grad_(name in parts)
        state = ("trains" if name in parts else "frozen") if members else "absent with this objective"
        log.info("%-14s %s, %s parameters", name, state, f"{sum(p.numel() for p in parameters):,}")


def part_modules(model: AsvrModel) -> dict[str, list[nn.Module]]:
    """The modules of each part that a phase may train."""
    head = model.objective.visual_head
    return {
        "projector": [model.llava.model.multi_modal_projector],
        "visual_head": [head] if head is not None else [],
        "language_model": [model.llava.model.language_model, model.llava.lm_head],
    }


def load_trainable(model: AsvrModel, state: Mapping[str, Tensor]) -> None:
    """Copy weights of an earlier phase, named as `model.named_parameters()` names them, into `model`.

    A part is given whole or not at all. Weights of an objective that this phase does not have are left aside.

    Raises:
        InputError: a name this model does not have, another shape, or a part that is incomplete.
    """
    own = dict(model.named_parameters())
    given = {k: v for k, v in state.items() if not (k.startswith("objective.") and model.objective.visual_head is None)}
    if len(given) < len(state):
        log.info("%d weights of the earlier phase's objective are not used in this one", len(state) - len(given))
    for name, tensor in given.items():
        if name not in own:
            raise InputError(
                f"the earlier phase holds {name}, which this phase's model does not have; keep model equal"
            )
        if own[name].shape != tensor.shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)} in the earlier phase and {tuple(own[name].shape)} in this one; "
                "keep model and objective.head equal, and use manifests of the same codebook"
            )
    for part, members in part_modules(model).items():
        names = {id(p) for member in members for p in member.parameters()}
        expected = {name for name, p in own.items() if id(p) in names}
        lacking = sorted(expected - given.keys())
        if lacking and len(lacking) < len(expected):
            raise InputError(f"the earlier phase holds only some weights of the {part}: {lacking[0]} is missing")
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


def _load_language_model(location: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(
            f"no language model can be read from {location} ({first_line}); "
            "model.language_model is a folder or hub id of a causal language model"
        ) from error
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
