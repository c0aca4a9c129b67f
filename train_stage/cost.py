"""What a model takes: its parameters by part, and the FLOPs of a step, from its shapes alone (the meta device will do)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import nn

from train_stage.flops import FlopModel, Forward, linear_elements
from train_stage.model import AsvrModel
from train_stage.parts import part_parameters
from train_stage.tower import layout_of, resolve_layer, tower_grid


@dataclass(frozen=True)
class Part:
    """A part of the model: its parameters, and how many of them train."""

    name: str
    parameters: int
    trained: int


def count_parts(model: AsvrModel) -> list[Part]:
    """The parts, vision tower first; a part that the phase does not have has no parameters."""
    parts = {"vision_tower": list(model.vision_tower.parameters()), **part_parameters(model)}
    return [
        Part(name, sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad))
        for name, own in parts.items()
    ]


def kept(parts: Iterable[Part]) -> int:
    """How many parameters a checkpoint keeps for the next phase: a part is kept whole, though only adapters of it train."""
    return sum(part.parameters for part in parts if part.trained)


def flop_model(model: AsvrModel, view_size: int) -> FlopModel:
    """The FLOPs of a step of this model, with the parts that train now, on views of `view_size` pixels.

    Only the tower's blocks below the highest layer that is looked at are run. A language model is taken for dense, its
    attention for full (see `train_stage.flops`).
    """
    llava = model.llava
    text = llava.config.text_config
    language, projector = llava.model.language_model, llava.model.multi_modal_projector
    projector_trains = _trains(projector)
    language_trains = _trains(language) or _trains(llava.lm_head)
    heads = {name: term.flops_per_target() for name, term in model.terms.items()}
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = Forward(pairs=4.0 * text.num_hidden_layers * text.num_attention_heads * head_width)
    positions = _positions(model, view_size)
    first, second = (
        Forward(weights=2.0 * linear_elements(layer)) for layer in (projector.linear_1, projector.linear_2)
    )
    projected = Forward(first=first.weights) + second
    below_head = projector_trains or language_trains
    return FlopModel(
        token=_linears(language.modules(), below=projector_trains),
        pair=attention.step(trains=language_trains, below=projector_trains),
        text_token=_linears(llava.lm_head.modules(), below=below_head),
        view=(_tower_forward(model, view_size) if model.runs_tower else 0.0)
        + positions * projected.step(trains=projector_trains, below=False),
        target={
            name: forward.step(trains=_trains(model.terms[name]), below=below_head) for name, forward in heads.items()
        },
    )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _linears(modules: Iterable[nn.Module], *, below: bool) -> float:
    """Forward and backward of one row through every linear layer, each by whether its own weight trains.

    A layer passes a gradient on where anything of these modules trains, or something below them.
    """
    layers = [one for one in modules if isinstance(one, nn.Linear)]
    flows = below or any(one.weight.requires_grad for one in layers)
    return sum(
        Forward(weights=2.0 * linear_elements(one)).step(trains=one.weight.requires_grad, below=flows) for one in layers
    )


def _positions(model: AsvrModel, view_size: int) -> int:
    rows, columns = tower_grid(model.vision_tower.config, view_size)
    return rows * columns


def _tower_forward(model: AsvrModel, view_size: int) -> float:
    """FLOPs of a view through the frozen tower: patch embedding, and the blocks that are run."""
    tower, config = model.vision_tower, model.vision_tower.config
    layout = layout_of(config)
    blocks = cast("nn.ModuleList", tower.get_submodule(layout.blocks))
    wanted = [model.llava.config.vision_feature_layer]
    wanted += [term.tower_layer for term in model.terms.values() if term.tower_layer is not None]
    run = blocks[: max(resolve_layer(layer, len(blocks)) for layer in wanted)]
    positions = _positions(model, view_size)
    tokens = positions + layout.class_tokens
    patch = 2.0 * 3 * config.patch_size**2 * config.hidden_size
    each = sum(2.0 * linear_elements(block) for block in run) * tokens
    return patch * positions + each + len(run) * 4.0 * tokens**2 * config.hidden_size
