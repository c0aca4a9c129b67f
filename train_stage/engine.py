"""DeepSpeed, and the only file that imports it.

Gradients are summed, not averaged by DeepSpeed's idea of a batch: the caller hands in losses that already carry
their share of the whole step, so neither the number of micro-batches nor of ranks changes a step.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from manifests.atomic import make_folder, storage_errors
from manifests.errors import EnvironmentProblem, RecipeError, StorageError
from train_stage.config import ResolvedPhase, TrainConfig
from train_stage.ranks import Ranks
from train_stage.tensor_files import damage_named, tensor_storage_errors

_TAG = "deepspeed"
"""The folder of a checkpoint that is DeepSpeed's own."""

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of AdamW, as LLaVA-1.5 (the Hugging Face defaults)."""


def prepare_environment() -> None:
    """Settings that DeepSpeed reads when it is imported. Call before anything else of this file.

    On a machine without a GPU DeepSpeed compiles a communication op, once per `TORCH_EXTENSIONS_DIR`; without the
    tools for that it is an EnvironmentProblem. A virtual environment keeps its own copy and uses its own ninja: two
    environments that share a copy, or two versions of ninja, compile it over and over again.
    """
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 announces to drop.
    warnings.filterwarnings("ignore", message="`torch.distributed.", category=FutureWarning)
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    beside_python = str(Path(sys.executable).parent)
    if shutil.which("ninja", path=beside_python):
        os.environ["PATH"] = f"{beside_python}{os.pathsep}{os.environ.get('PATH', '')}"
    for program, package in (("ninja", "ninja"), (os.environ.get("CXX", "g++"), "g++")):
        if shutil.which(program) is None:
            raise EnvironmentProblem(
                f"{program} is not on PATH, and without a GPU DeepSpeed compiles its communication op with it: "
                f"install {package} (e.g. apt-get install {'ninja-build' if package == 'ninja' else package})"
            )


def load_communication_op() -> None:
    """Load DeepSpeed's CPU communication op, compiled first if it has to be; nothing to do where there is a GPU.

    torch guards the compilation with a lock file that a killed process leaves behind, and on which everybody after it
    would wait for ever. Here a lock of the kernel stands before it: who holds that one knows the file to be a leftover.
    """
    if torch.cuda.is_available():
        return
    with _quiet():
        from deepspeed.accelerator import get_accelerator
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    with storage_errors("write", folder):
        make_folder(folder)
        with (folder / ".asvr-lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / builder.name / "lock").unlink(missing_ok=True)
            with _quiet():
                builder.load(verbose=False)


def deepspeed_settings(config: TrainConfig, phase: ResolvedPhase, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration: what this stage decides, and the user's `deepspeed` over it."""
    half = config.precision == "bfloat16"
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": phase.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": phase.micro_batch_size * world,
        # `step()` ends a step, after as many backward passes as the step has micro-batches.
        "managed_gradient_accumulation": False,
        "gradient_clipping": phase.clip,
        "bf16": {"enabled": half, "check_grad_overflow": True},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 1 << 60,
    }
    if half:
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(derived, config.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        own = merged.get(key)
        merged[key] = _merge(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return merged


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters, matrices with weight decay and vectors (biases, norms) without."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Engine:
    """A model on its device under ZeRO, with AdamW. Losses go in with `backward`, one `step` ends a step."""

    def __init__(self, model: nn.Module, config: TrainConfig, phase: ResolvedPhase, ranks: Ranks) -> None:
        load_communication_op()
        with _quiet():
            import deepspeed

            optimizer = torch.optim.AdamW(
                parameter_groups(model, phase.weight_decay),
                lr=phase.lr,
                betas=BETAS,
                eps=EPSILON,
                fused=ranks.device.type == "cuda",
            )
            deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)
            try:
                self._engine, *_ = deepspeed.initialize(
                    model=model, optimizer=optimizer, config=deepspeed_settings(config, phase, ranks.world)
                )
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(str(part) for part in first["loc"])
                raise RecipeError(f"DeepSpeed refuses {key} of its settings ({error.title}): {first['msg']}") from error
        # It would put a script for its own files into every checkpoint, beside weights that need none.
        self._engine._copy_recovery_script = lambda _folder: None
        self.ranks = ranks

    @property
    def model(self) -> nn.Module:
        """The model itself, in DeepSpeed's hands."""
        module: nn.Module = self._engine.module
        return module

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward pass."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the step's loss.

        DeepSpeed averages gradients over the ranks where the step wants their sum, hence the factor.
        """
        self._engine.backward(loss * self.ranks.world, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip and update; the global gradient norm before clipping. A norm that is not finite updates nothing."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return norm if math.isfinite(norm) and norm >= 0 else math.inf

    def close(self) -> None:
        """Let go of the model and of DeepSpeed's buffers."""
        self._engine.destroy()

    def save(self, folder: Path) -> None:
        """Write what DeepSpeed needs to go on below `folder`, frozen weights left out. Collective.

        StorageError when a rank's disk refuses: only when all ranks are through, because DeepSpeed waits for each.
        """
        with self.ranks.together(), storage_errors("write", folder):
            make_folder(folder / _TAG)
        with _quiet(), _put_off(self._engine.checkpoint_engine) as refused:
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
        self.ranks.share_error(refused[0] if refused else None)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote below `folder`, written by as many ranks as there are now. Collective.

        TrainingStopped when it is damaged.
        """
        with _quiet(), damage_named(folder):
            # Not strict: the frozen weights are not in there.
            path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
            if path is None:
                raise FileNotFoundError("DeepSpeed finds nothing in it")


@contextlib.contextmanager
def _put_off(writer: Any) -> Iterator[list[StorageError]]:
    """Collect the refused writes of a DeepSpeed checkpoint engine instead of raising them."""
    refused: list[StorageError] = []
    write = writer.save

    def attempt(state_dict: Any, path: str) -> None:
        try:
            with tensor_storage_errors(Path(path)):
                write(state_dict, path)
        except StorageError as error:
            refused.append(error)

    writer.save = attempt
    try:
        yield refused
    finally:
        del writer.save


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's notices off the console; its warnings of its own log level `error` still come through."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
