"""LoRA (arXiv 2106.09685) through peft: trainable matrices of low rank beside frozen linear layers of the language model.

A layer then computes W x + (alpha / rank) B A dropout(x). Adapters exist in training alone: they are in DeepSpeed's own
checkpoint, for exact resume. What the engine hands out, and with it the next phase and the export, has
W + (alpha / rank) B A under the layer's own name, so that nothing after training knows of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from manifests.errors import EnvironmentProblem, RecipeError
from train_stage.lora_config import LoraConfig
from train_stage.model import AsvrModel
from train_stage.parts import part_parameters

log = logging.getLogger(__name__)

_ADAPTER = "default"
"""peft's name for the only set of adapters there is."""

_BASE = ".base_layer."
"""What peft puts into the names of a layer that has an adapter."""


def add_adapters(model: AsvrModel, settings: LoraConfig, seed: int) -> None:
    """Freeze the language model, and put a trainable adapter beside each of its linear layers that `settings` name.

    The first matrix A is drawn from `seed`, the same on every rank, and B is zero: the model still computes what it did.

    Raises:
        RecipeError: a target that no linear layer is called.
        EnvironmentProblem: peft is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise EnvironmentProblem("the package peft is not installed; run: pip install 'asvr[lora]'") from error

    language_model = model.llava.model.language_model
    found = {name: name.rpartition(".")[2] for name, m in language_model.named_modules() if isinstance(m, nn.Linear)}
    names = dict.fromkeys(found.values())
    unknown = [target for target in settings.targets or () if target not in names]
    if unknown:
        raise RecipeError(
            f"lora.targets has {unknown[0]}, but the linear layers of the language model are called {', '.join(names)}"
        )
    chosen = set(settings.targets or names)
    for parameter in part_parameters(model)["language_model"]:
        parameter.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(
            peft.LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=[name for name, last in found.items() if last in chosen],
            ),
            language_model,
        )
    trained = sum(p.numel() for p in language_model.parameters() if p.requires_grad)
    layers = sum(last in chosen for last in found.values())
    log.info(
        "language_model through adapters of rank %d on %d layers (%s): %s parameters train, its own are frozen",
        settings.rank,
        layers,
        ", ".join(name for name in names if name in chosen),
        f"{trained:,}",
    )


@dataclass(frozen=True)
class Stored:
    """A parameter as checkpoints and exports have it: its own value and what its adapter adds.

    parameter  W (out, in), or of any shape where there is no adapter
    adapter    A (rank, in) and B (out, rank), or nothing
    """

    parameter: nn.Parameter
    adapter: tuple[nn.Parameter, ...] = ()
    scale: float = 1.0

    @property
    def parts(self) -> list[nn.Parameter]:
        """Every parameter that the value is made of."""
        return [self.parameter, *self.adapter]

    def value(self) -> Tensor:
        """W + scale * B A, added in float32 and in the dtype of W; detached."""
        own = self.parameter.detach()
        if not self.adapter:
            return own
        first, second = (matrix.detach().float() for matrix in self.adapter)
        return own.float().addmm(second, first, alpha=self.scale).to(own.dtype)


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, Stored]]:
    """The parameters of a model by the names they have without adapters."""
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        layer, is_adapted, last = name.partition(_BASE)
        if is_adapted and last == "weight":
            matrices = tuple(own[f"{layer}.{matrix}.{_ADAPTER}.weight"] for matrix in ("lora_A", "lora_B"))
            scale = cast("dict[str, float]", model.get_submodule(layer).scaling)[_ADAPTER]
            yield f"{layer}.weight", Stored(parameter, matrices, scale)
        elif ".lora_A." not in name and ".lora_B." not in name:
            yield name.replace(_BASE, "."), Stored(parameter)
