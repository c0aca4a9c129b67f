"""The parts of a model that a phase may train: which of them it does, and what an earlier phase made of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn

from manifests.errors import InputError
from train_stage.model import AsvrModel, image_newline

log = logging.getLogger(__name__)

NEWLINE_NAME = "llava.model.image_newline"


def set_trainable(model: AsvrModel, parts: Set[str]) -> None:
    """Train exactly `parts` of projector, visual_head, language_model, and say so line by line.

    The vision tower is always frozen. A part that the objective does not have is stated and passed over.
    """
    members = part_parameters(model)
    unknown = sorted(parts - members.keys())
    if unknown:
        raise ValueError(f"no trainable part is called {unknown[0]}; there are {', '.join(members)}")
    for name, parameters in {"vision_tower": list(model.vision_tower.parameters()), **members}.items():
        for parameter in parameters:
            parameter.requires_grad_(name in parts)
        state = ("trains" if name in parts else "frozen") if parameters else "absent with this objective"
        log.info("%-14s %s, %s parameters", name, state, f"{sum(p.numel() for p in parameters):,}")


def part_parameters(model: AsvrModel) -> dict[str, list[nn.Parameter]]:
    """The parameters of each part that a phase may train; LLaVA-NeXT's newline vector goes with the projector."""
    newline = image_newline(model.llava)
    # A tied output layer belongs to two modules.
    language_model = nn.ModuleList([model.llava.model.language_model, model.llava.lm_head])
    return {
        "projector": [*model.llava.model.multi_modal_projector.parameters(), *([] if newline is None else [newline])],
        "visual_head": list(model.objectives.parameters()),
        "language_model": list(language_model.parameters()),
    }


def load_trainable(model: AsvrModel, state: Mapping[str, Tensor]) -> None:
    """Copy weights of an earlier phase, named as `model.named_parameters()` names them, into `model`.

    A part (of the visual head, a term) is given whole or not at all, but for the newline of LLaVA-NeXT. Weights of an objective that this phase does not have are left aside.

    Raises:
        InputError: a name this model does not have, another shape, or a part that is incomplete.
    """
    own = dict(model.named_parameters())
    given = {k: v for k, v in state.items() if not k.startswith("objectives.") or k.split(".")[1] in model.objectives}
    if len(given) < len(state):
        log.info("%d weights of the earlier phase's objective are not used in this one", len(state) - len(given))
    for name, tensor in given.items():
        if name == NEWLINE_NAME and name not in own:
            raise InputError(
                "the earlier phase trained LLaVA-NeXT's image_newline, for which this phase has no place: a phase whose "
                "geometry has one view an image goes before those with anyres, not after"
            )
        if name not in own:
            raise InputError(
                f"the earlier phase holds {name}, which this phase's model does not have; keep model equal"
            )
        if own[name].shape != tensor.shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)} in the earlier phase and {tuple(own[name].shape)} in this one; "
                "keep model and objective equal, and use manifests of the same codebook"
            )
    parts = part_parameters(model)
    del parts["visual_head"]
    parts |= {f"objective {name}": list(term.parameters()) for name, term in model.objectives.items()}
    for part, members in parts.items():
        identities = {id(parameter) for parameter in members}
        # A phase with one view an image has no newline, and the one after it starts with a fresh one.
        expected = {name for name, p in own.items() if id(p) in identities} - {NEWLINE_NAME}
        lacking = sorted(expected - given.keys())
        if lacking and len(lacking) < len(expected):
            raise InputError(f"the earlier phase holds only some weights of the {part}: {lacking[0]} is missing")
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)
