"""The model in DeepSpeed's hands.

Gradients are summed, not averaged by DeepSpeed's idea of a batch: the caller hands in losses that already carry
their share of the whole step, so neither the number of micro-batches nor of ranks changes a step.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from manifests.atomic import flush, make_folder, storage_errors
from manifests.errors import RecipeError, StorageError, TrainingStopped
from train_stage import deepspeed_repairs as repairs
from train_stage.config import Part, ResolvedPhase, TrainConfig
from train_stage.deepspeed_process import load_communication_op, quiet
from train_stage.deepspeed_settings import stage_of
from train_stage.lora import Stored, stored_parameters
from train_stage.model import AsvrModel, image_newline
from train_stage.monitors import MONITORS, refused_setting
from train_stage.parts import part_parameters
from train_stage.ranks import Ranks
from train_stage.tensor_files import damage_named, tensor_storage_errors

_TAG = "deepspeed"
"""The folder of a checkpoint that is DeepSpeed's own."""

_UNIVERSAL = "universal"
"""The folder of a checkpoint in DeepSpeed's form for any number of ranks, made when it is needed."""

_WRITE_REFUSED = re.compile(r"\[Errno (27|28|122)\]|PytorchStreamWriter|unexpected pos")
"""What the converter's last words hold when a disk or a quota is full: Python's, or torch's own."""

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of AdamW, as LLaVA-1.5 (the Hugging Face defaults)."""


def deepspeed_settings(
    config: TrainConfig, phase: ResolvedPhase, world: int, *, universal: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration: what this stage decides, and the user's `deepspeed` over it.

    `universal` says that the checkpoint to be loaded was written by another number of ranks.
    """
    half = config.precision == "bfloat16"
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world,
        # `step()` ends a step, after as many backward passes as the step has micro-batches.
        "managed_gradient_accumulation": False,
        "gradient_clipping": phase.clip,
        "bf16": {"enabled": half, "check_grad_overflow": True},
        "zero_optimization": {"stage": 1},
        # Where the optimizer is offloaded it is still our own AdamW, fused on the CPU too.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
    if universal:
        derived["checkpoint"] = {"load_universal": True}
    if half:
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
        # Else what ranks have added up in float32 would be rounded before it is summed over them.
        derived["communication_data_type"] = "fp32"
    # Its monitors are ours to feed (`Monitors`): by itself it would write the loss of a micro-batch against samples.
    return _merge(derived, {key: value for key, value in config.deepspeed.items() if key not in MONITORS})


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        own = merged.get(key)
        merged[key] = _merge(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return merged


def parameter_groups(model: AsvrModel, phase: ResolvedPhase) -> list[dict[str, Any]]:
    """The trainable parameters by learning rate and weight decay, in the order of the model.

    `lr` is the peak of the parameter's part. Matrices have the phase's weight decay, vectors (biases, norms) none.
    """
    rates: dict[int, float] = {}
    for part, parameters in part_parameters(model).items():
        rate = phase.part_lr.get(cast("Part", part), phase.lr)
        rates |= {id(parameter): rate for parameter in parameters}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = phase.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((rates[id(parameter)], decay), []).append(parameter)
    return [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]


class Engine:
    """A model on its device under ZeRO, with AdamW. Losses go in with `backward`, one `step` ends a step.

    `written_by` is the number of ranks that wrote the checkpoint to be loaded, if one is.
    """

    def __init__(
        self,
        model: AsvrModel,
        config: TrainConfig,
        phase: ResolvedPhase,
        ranks: Ranks,
        *,
        written_by: int | None = None,
    ) -> None:
        self._universal = written_by not in (None, ranks.world)
        load_communication_op()
        with quiet():
            import deepspeed
            from deepspeed.runtime.config import DeepSpeedConfigError

            groups = parameter_groups(model, phase)
            self._rates = [group["lr"] / phase.lr for group in groups]
            self._decays = [group["weight_decay"] for group in groups]
            optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, fused=True)
            # ZeRO-3 gathers weights when a module is called, which is collective: every rank must call the same modules
            # equally often. But the heads and the output layer work in chunks, as many as the rank's samples need. So
            # each head is gathered whole, once a micro-batch, and the output layer's weight with the model's own.
            self._stage = stage_of(config.deepspeed)
            if self._stage == 3:
                for term in model.terms.values():
                    deepspeed.utils.set_z3_leaf_module(term, True)
            deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)
            try:
                settings = deepspeed_settings(config, phase, ranks.world, universal=self._universal)
                self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
            except ValidationError as error:
                raise refused_setting(error) from error
            except (DeepSpeedConfigError, AssertionError, ValueError) as error:
                if not config.deepspeed:
                    raise
                given, reason = ", ".join(config.deepspeed), (str(error).splitlines() or [type(error).__name__])[0]
                raise RecipeError(
                    f"DeepSpeed refuses its settings, of which the recipe gives {given}: {reason}"
                ) from error
            if self._stage == 3:
                newline = image_newline(model.llava)
                for parameter in (*model.llava.lm_head.parameters(), *([] if newline is None else [newline])):
                    deepspeed.zero.register_external_parameter(model, parameter)
        repairs.write_no_script(self._engine)
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
        """Clip and update; the global gradient norm before clipping. A norm that is not finite updates nothing.

        `learning_rate` is that of the phase; a part with a rate of its own keeps its proportion to it.
        """
        for group, rate in zip(self._engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = learning_rate * rate
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return norm if math.isfinite(norm) and norm >= 0 else math.inf

    def weights(self, names: Collection[str]) -> dict[str, Tensor]:
        """The named parameters, whole and on the CPU, on rank 0; nothing on the others. Collective.

        Names and values are those of a model without adapters: what an adapter learned is in the layer's own weight.
        """
        found: dict[str, Tensor] = {}
        for name, stored in stored_parameters(self.model):
            if name in names:
                with self._whole(stored):
                    if self.ranks.rank == 0:
                        found[name] = stored.value().to("cpu", copy=True).contiguous()
        return found

    def _whole(self, stored: Stored) -> contextlib.AbstractContextManager[None]:
        """ZeRO-3 cuts parameters into one piece a rank: put one together. One at a time, so that little is held."""
        if self._stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        gathered: contextlib.AbstractContextManager[None] = deepspeed.zero.GatheredParameters(stored.parts)
        return gathered

    def close(self) -> None:
        """Let go of the model and of DeepSpeed's buffers."""
        self._engine.destroy()
        if self._stage == 3:
            repairs.leave_nothing(self.model)

    def save(self, folder: Path) -> None:
        """Write what DeepSpeed needs to go on below `folder`, frozen weights left out. Collective.

        StorageError when a rank's disk refuses: only when all ranks are through, because DeepSpeed waits for each.
        """
        with self.ranks.together(), storage_errors("write", folder):
            make_folder(folder / _TAG)
        with quiet(), _put_off(self._engine.checkpoint_engine) as refused:
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
        self.ranks.share_error(refused[0] if refused else None)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote below `folder`. Collective.

        What another number of ranks wrote is brought into DeepSpeed's universal form first (another 12 bytes a trained
        parameter on disk, kept for the next time). TrainingStopped when it is damaged.
        """
        if self._universal:
            with self.ranks.together():
                if self.ranks.rank == 0:
                    make_universal(folder)
        tag = _UNIVERSAL if self._universal else _TAG
        with quiet(), damage_named(folder):
            # Not strict: the frozen weights are not in there.
            path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
            if path is None:
                raise FileNotFoundError("DeepSpeed finds nothing in it")
        if self._universal:
            optimizer = self._engine.optimizer.optimizer
            repairs.give_own_steps(optimizer)
            if self._stage == 3:
                repairs.give_own_decays(optimizer, self._decays)


def make_universal(folder: Path) -> None:
    """Convert the DeepSpeed checkpoint below `folder` to its universal form, unless that is there already.

    In a process of its own, because the converter starts others. Raises TrainingStopped with its last line of error
    output, and StorageError when there is no room for it; nothing of it is left then.
    """
    made, draft = folder / _UNIVERSAL, folder / f"{_UNIVERSAL}.tmp"
    if made.is_dir():
        return
    with storage_errors("write", folder):
        shutil.rmtree(draft, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        # It looks for a state that only Megatron writes.
        options = ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
        places = ["--input_folder", str(folder / _TAG), "--output_folder", str(draft)]
        done = subprocess.run([*command, *options, *places], capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(draft, ignore_errors=True)
            if _WRITE_REFUSED.search(done.stderr):
                raise OSError("the converted checkpoint could not be written to the end, as when a disk is full")
            if done.returncode < 0:
                raise TrainingStopped(
                    f"converting {folder / _TAG} for another number of ranks was ended by "
                    f"{signal.Signals(-done.returncode).name}, as when a machine's memory is full: run the command again, or "
                    "resume with the number that wrote it"
                )
            reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1][:300]
            raise TrainingStopped(
                f"DeepSpeed cannot convert {folder / _TAG} for another number of ranks ({reason}): resume with the "
                "number that wrote it, or remove this checkpoint"
            )
        (folder / f"latest_{_UNIVERSAL}").unlink(missing_ok=True)
        for written in draft.rglob("*"):
            flush(written)
        draft.rename(made)


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
