"""The model in training: a Hugging Face LLaVA, or LLaVA-NeXT for several views an image, and the objectives beside it.

Shapes: B rows of samples end to end, L tokens, V views, P positions of a view, H width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, PreTrainedModel

from train_stage import config as configs
from train_stage import tower
from train_stage.attention import packed_inputs
from train_stage.batch import NO_TOKEN, Batch
from train_stage.discrete_llava import CodeEmbedding
from train_stage.losses import LossSums, text_loss
from train_stage.objectives import Objective

Llava: TypeAlias = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration


@dataclass(frozen=True)
class States:
    """What a micro-batch became on its way through the model.

    hidden_BLH  the language model's last hidden states, after its final norm
    language    further hidden_states of the language model (B, L, H), by the layers that terms ask for
    tower       hidden_states of the frozen tower without class token (V, P, C), by the layers that terms ask for
    """

    hidden_BLH: Tensor
    language: Mapping[int, Tensor]
    tower: Mapping[int, Tensor]

    def of(self, term: Objective) -> Tensor:
        """The hidden states (B, L, H) that a term looks at, with a gradient even where nothing before it trains."""
        hidden = self.hidden_BLH if term.language_layer is None else self.language[term.language_layer]
        # ZeRO-3 takes a term's backward pass for finished when this gradient is there.
        return hidden if hidden.requires_grad or not torch.is_grad_enabled() else hidden.detach().requires_grad_()


class AsvrModel(nn.Module):
    """LLaVA plus the terms of the visual loss, by name. `forward` gives the sums of one micro-batch; a step's loss is made of many.

    The parameters keep the names of Hugging Face's classes, so that export renames and never converts.
    """

    def __init__(self, llava: Llava, objectives: nn.ModuleDict, pixel_norm: tower.PixelNorm) -> None:
        super().__init__()
        self.llava = llava
        self.objectives = objectives
        self.pixel_norm = pixel_norm
        self.reads_features = False
        """Whether the tower's output comes with the batch, as target `vision_features`."""
        self.code_embedding: CodeEmbedding | None = None
        """What the projector is given instead of the tower's output: vectors of the target `input_codes`."""
        self.vision_tower.requires_grad_(False)

    @property
    def runs_tower(self) -> bool:
        """Whether the tower computes what the projector is given, in every step."""
        return not self.reads_features and self.code_embedding is None

    @property
    def vision_tower(self) -> PreTrainedModel:
        return self.llava.model.vision_tower

    def forward(self, batch: Batch) -> LossSums:
        """Every trainable parameter takes part, whatever the batch holds; see `batch.dummy_view`."""
        states = self.states(batch)
        text_sum, text_tokens = text_loss(states.hidden_BLH, batch.labels, self._output_layer)
        terms = {name: term(states.of(term), batch, states.tower) for name, term in self.terms.items()}
        return LossSums(text_sum, text_tokens, terms)

    def _output_layer(self, hidden: Tensor) -> Tensor:
        """Logits. Not by calling `lm_head`: ZeRO-3 would gather its weight once a chunk; see `engine`."""
        return F.linear(hidden, self.llava.lm_head.weight, self.llava.lm_head.bias)

    @property
    def terms(self) -> dict[str, Objective]:
        """The terms of the visual loss by name."""
        return {name: cast("Objective", term) for name, term in self.objectives.items()}

    def states(self, batch: Batch) -> States:
        """Last hidden states, and whatever else a term of the loss looks at."""
        own = self.llava.config.vision_feature_layer
        patches = self._computed(batch, own) if self.runs_tower else {own: self._stored(batch)}
        inputs_BLH = self._place(self.llava.get_input_embeddings()(batch.input_ids), batch, patches[own])
        layers = {term.language_layer for term in self.terms.values() if term.language_layer is not None}
        outputs = self.llava.model.language_model(
            inputs_embeds=inputs_BLH,
            output_hidden_states=bool(layers),
            **packed_inputs(self.llava.model.language_model, batch.position_ids),
        )
        language = {layer: outputs.hidden_states[layer] for layer in layers}
        return States(outputs.last_hidden_state, language, patches)

    @torch.no_grad()
    def _computed(self, batch: Batch, own: int) -> dict[int, Tensor]:
        layers = {own, *(term.tower_layer for term in self.terms.values() if term.tower_layer is not None)}
        return tower.patch_features(self.vision_tower, self.pixel_norm(batch.views), sorted(layers))

    def _stored(self, batch: Batch) -> Tensor:
        """What the projector is given (V, P, C) as it was tokenized; the dummy of a micro-batch without images is zeros."""
        dtype = self.vision_tower.dtype
        if self.code_embedding is not None:
            codes = batch.targets.get(configs.INPUT_CODES)
            if codes is None:
                codes = batch.view_position.new_zeros(*batch.view_position.shape, self.code_embedding.depth)
            return self.code_embedding(codes).to(dtype)
        stored = batch.targets.get(configs.VISION_FEATURES)
        if stored is None:
            shape = (*batch.view_position.shape, self.vision_tower.config.hidden_size)
            return torch.zeros(shape, dtype=dtype, device=batch.views.device)
        return stored.to(dtype)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The language model's last hidden states after its final norm, (B, L, H)."""
        return self.states(batch).hidden_BLH

    def train(self, mode: bool = True) -> AsvrModel:
        """As usual, but the tower stays in evaluation mode: it is frozen, so it drops nothing out."""
        super().train(mode)
        self.vision_tower.eval()
        return self

    def _place(self, embeds_BLH: Tensor, batch: Batch, patches_VPC: Tensor) -> Tensor:
        """Token embeddings with the projected features of each view, and LLaVA-NeXT's newlines, over its image tokens."""
        features = self.llava.model.multi_modal_projector(patches_VPC).flatten(0, 1)
        flat = embeds_BLH.flatten(0, 1)
        # What has no token goes to one extra row that is then cut off: no branch, and projector and newline are in
        # the graph of every micro-batch.
        rows = len(flat)
        target = torch.where(batch.view_position == NO_TOKEN, rows, batch.view_position).flatten()
        newline = image_newline(self.llava)
        if newline is not None:
            ends = target.new_empty(0) if batch.newline_position is None else batch.newline_position
            target = torch.cat([target, ends, target.new_full((1,), rows)])
            features = torch.cat([features, newline.to(features.dtype).expand(len(ends) + 1, -1)])
        padded = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
        return padded.index_copy(0, target, features.to(flat.dtype))[:rows].view_as(embeds_BLH)


def image_newline(llava: Llava) -> nn.Parameter | None:
    """LLaVA-NeXT's vector at the end of each row of joined tiles; None in a LLaVA."""
    return llava.model.image_newline if isinstance(llava, LlavaNextForConditionalGeneration) else None
