"""What DeepSpeed 0.19 leaves wrong around a checkpoint and after a run, put right from outside."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def write_no_script(engine: Any) -> None:
    """Keep it from putting a script for its own files into every checkpoint, beside weights that need none."""
    engine._copy_recovery_script = lambda _folder: None


def give_own_steps(optimizer: torch.optim.Optimizer) -> None:
    """After a universal checkpoint: every parameter a `step` of its own, where the parameter is.

    ZeRO-3 gives all groups one and the same tensor, which every group then counts up; and in every stage it stays on the
    CPU, where a fused AdamW does not take it for a parameter on a GPU.
    """
    for parameter, state in optimizer.state.items():
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(parameter.device, copy=True)


def give_own_decays(optimizer: torch.optim.Optimizer, decays: Sequence[float]) -> None:
    """After a universal checkpoint under ZeRO-3, which gives all groups the settings of the first: their weight decays."""
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay


def leave_nothing(model: nn.Module) -> None:
    """After a ZeRO-3 engine is done: undo what it has changed for as long as the process lives.

    A stack and a method's cache would keep the weights of `model` in memory for the phases after it. And every linear
    layer, also of models that ZeRO-3 never had, would add its bias in a step of its own, which rounds bfloat16 twice.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patched
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not model]
    instrumented = Coordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(instrumented).nonlocals["func"].cache_clear()
    nn.functional.linear = getattr(Patched, "linear_bk", nn.functional.linear)
