"""Which settings of DeepSpeed's JSON a recipe may give, and why not the others. Torch-free, and DeepSpeed-free.

DeepSpeed passes over a top-level key that it does not know, so a slip of the pen would go unnoticed. Here every key that
DeepSpeed 0.19 reads stands in one of four tables, and any other one is refused.
"""

from __future__ import annotations

import difflib
from typing import Any

DERIVED: dict[str, str] = {
    "train_batch_size": "the phase's batch_size",
    "train_micro_batch_size_per_gpu": "the phase's micro_batch_tokens",
    "gradient_accumulation_steps": "batch_size, micro_batch_tokens and the number of ranks",
    "optimizer": "the phase's lr and weight_decay (the optimizer is torch.optim.AdamW)",
    "zero_allow_untested_optimizer": "the phase's lr and weight_decay (the optimizer is torch.optim.AdamW)",
    "zero_force_ds_cpu_optimizer": "the phase's lr and weight_decay (the optimizer is torch.optim.AdamW)",
    "scheduler": "the phase's lr and warmup_ratio (linear warm-up, then cosine)",
    "gradient_clipping": "the phase's clip",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "activation_checkpointing": "recompute_activations",
    "managed_gradient_accumulation": "batch_size and micro_batch_tokens",
    "gradient_allreduce_op": "batch_size (a step's gradients are summed)",
    "steps_per_print": "log_every",
    "checkpoint": "save_every and keep_last",
    "datastates_ckpt": "save_every and keep_last",
    "nebula": "save_every and keep_last",
    "dataloader_drop_last": "batch_size (the last step of an epoch may be smaller)",
}
"""Settings that the configuration decides, and the field that decides each."""

FOREIGN: dict[str, str] = {
    **dict.fromkeys(("curriculum_learning", "data_efficiency"), "changes the order of the samples"),
    **dict.fromkeys(
        (
            "compile",
            "compression_training",
            "eigenvalue",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "weight_quantization",
        ),
        "changes the model",
    ),
    **dict.fromkeys(
        (
            "expert_parallel",
            "graph_harvesting",
            "hybrid_engine",
            "pipeline",
            "seq_parallel_communication_data_type",
            "sequence_parallel_size",
            "sparse_gradients",
            "tensor_parallel",
            "use_data_before_expert_parallelism",
            "vocabulary_size",
        ),
        "is for models that are cut in other ways than by ZeRO",
    ),
    **dict.fromkeys(("autotuning", "elasticity"), "is for DeepSpeed's own launcher"),
    "aio": "is for offloading to NVMe disks",
}
"""Settings of DeepSpeed that this trainer cannot honour, and what is wrong with each."""

WATCHING = frozenset(
    {
        "comet",
        "comms_logger",
        "csv_monitor",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "log_level",
        "memory_breakdown",
        "tensorboard",
        "timers",
        "wall_clock_breakdown",
        "wandb",
    }
)
"""Settings that are passed on and change no number, so a run may resume with others."""

DECIDING = frozenset(
    {
        "communication_data_type",
        "disable_allgather",
        "gradient_predivide_factor",
        "prescale_gradients",
        "zero_optimization",
    }
)
"""Settings that are passed on and may change numbers."""

SECTIONS = ("zero_optimization", "tensorboard", "csv_monitor", "wandb", "comet")
"""Settings whose values are settings themselves, which this trainer looks into."""

UNFIT: dict[str, str] = {
    "legacy_stage1": "is of DeepSpeed 0.5",
    "stage3_module_granularity_threshold": "changes which weights are gathered together, which is settled here so that ranks "
    "with different samples do not wait for each other",
}
"""Settings of `zero_optimization` with which a run would stop in its first step, and why."""

OFFLOADED = ("offload_optimizer", "offload_param")
"""Settings of `zero_optimization` that move a part of the states to the host's memory."""

STAGES = (1, 2, 3)


def is_offloaded(settings: dict[str, Any], key: str) -> bool:
    """Whether settings that `check` lets pass move to the host what `key` of OFFLOADED names."""
    return (settings.get("zero_optimization", {}).get(key) or {}).get("device", "none") != "none"


def stage_of(settings: dict[str, Any]) -> int:
    """The ZeRO stage that settings ask for: 1 unless they say otherwise."""
    return int(settings.get("zero_optimization", {}).get("stage", 1))


def check(settings: dict[str, Any]) -> None:
    """ValueError for the first key that cannot be given, with what to do instead."""
    for key in settings:
        if key in DERIVED:
            raise ValueError(f"deepspeed.{key} is derived from {DERIVED[key]}; remove it")
        if key in FOREIGN:
            raise ValueError(f"deepspeed.{key} {FOREIGN[key]}, which this trainer does not support; remove it")
        if key not in WATCHING | DECIDING:
            near = difflib.get_close_matches(key, WATCHING | DECIDING, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(WATCHING | DECIDING))}"
            raise ValueError(f"deepspeed.{key} is no setting that DeepSpeed reads: {hint}")
    flat = next((key for key in SECTIONS if not isinstance(settings.get(key, {}), dict)), None)
    if flat is not None:
        raise ValueError(f"deepspeed.{flat} is a mapping of settings, not {settings[flat]!r}")
    zero = settings.get("zero_optimization", {})
    if zero.get("stage", 1) not in STAGES:
        raise ValueError("deepspeed.zero_optimization.stage is 1, 2 or 3")
    for key, reason in UNFIT.items():
        if zero.get(key):
            raise ValueError(f"deepspeed.zero_optimization.{key} {reason}; remove it")
    for key in OFFLOADED:
        where = zero.get(key) or {}
        if not isinstance(where, dict) or where.get("device", "none") not in ("none", "cpu"):
            raise ValueError(
                f"deepspeed.zero_optimization.{key} is {{device: cpu}} or not there: offloading to NVMe disks is not supported"
            )
    if zero.get("overlap_comm") and stage_of(settings) == 1:
        raise ValueError(
            "deepspeed.zero_optimization.overlap_comm is for stages 2 and 3, because gradients of stage 1 are summed once, at the "
            "end of a step; remove it"
        )


def that_decide(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run must have in common with the run before.

    Of `zero_optimization` those are the stage, which DeepSpeed cannot change, and what is offloaded, because the
    optimizer then computes elsewhere; sizes of buckets and the like may change.
    """
    decide = {key: value for key, value in settings.items() if key in DECIDING - {"zero_optimization"}}
    zero = settings.get("zero_optimization", {})
    offloaded = {key: zero[key].get("device") for key in OFFLOADED if zero.get(key)}
    return {**decide, "zero_optimization": {"stage": stage_of(settings), **offloaded}}
