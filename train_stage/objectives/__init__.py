"""What the hidden states at image positions are asked for, beside the text loss. One file per kind of term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

from torch import nn

from train_stage.objective_config import Term
from train_stage.objectives.base import Objective, Surroundings, Target


def build_objectives(terms: Sequence[Term], targets: Mapping[str, Target], around: Surroundings) -> nn.ModuleDict:
    """The terms of a phase by name, fresh; `targets` holds those that have manifests.

    InputError when a term and its manifests do not fit each other or the model.
    """
    built = {}
    for term in terms:
        module = import_module(f"train_stage.objectives.{term.kind}")
        built[term.name] = module.build(term, targets.get(term.name), around)
    return nn.ModuleDict(built)


__all__ = ["Objective", "Surroundings", "Target", "build_objectives"]
