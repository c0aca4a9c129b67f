"""What a training run is: the model, its phases, and how they are run. Torch-free: a recipe is checked in no time.

The pipeline resolves names and relative paths of a recipe and writes the result as `RUN/config.json`;
`python -m train_stage RUN/config.json` reads exactly that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from manifests.paths import HubOrPath, LocalPath, ManifestRef
from manifests.schema import Geometry

Part = Literal["projector", "visual_head", "language_model"]
"""What a phase may train; the vision tower stays frozen always."""

TemplateName = Literal["plain", "vicuna_v1"]

PRETRAIN = "pretrain"
"""The phase name that has LLaVA-1.5's defaults of feature alignment; any other name has those of instruction tuning."""

DERIVED_DEEPSPEED_KEYS: dict[str, str] = {
    "train_batch_size": "the phase's batch_size",
    "train_micro_batch_size_per_gpu": "the phase's micro_batch_size",
    "gradient_accumulation_steps": "batch_size, micro_batch_size and the number of ranks",
    "optimizer": "the phase's lr and weight_decay (the optimizer is torch.optim.AdamW)",
    "scheduler": "the phase's lr and warmup_ratio (linear warm-up, then cosine)",
    "gradient_clipping": "the phase's clip",
    "bf16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "data_types": "precision",
    "managed_gradient_accumulation": "batch_size and micro_batch_size",
    "steps_per_print": "log_every",
    "checkpoint": "save_every and keep_last",
}
"""DeepSpeed settings that this configuration decides, and the field that decides each."""


class Strict(BaseModel):
    """Base of the stage's configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Strict):
    """The LLaVA model: any causal language model and any SigLIP, CLIP or DINOv2 style tower, as folder or hub id."""

    language_model: HubOrPath = Field(description="folder or hub id of a causal language model")
    tokenizer: HubOrPath | None = Field(default=None, description="folder or hub id; default: that of language_model")
    vision_tower: HubOrPath = Field(description="folder or hub id of a Hugging Face vision encoder")
    vision_feature_layer: int = Field(default=-2, description="which of the tower's hidden_states; LLaVA's is -2")
    image_token: str = Field(default="<image>", description="placeholder of an image, added to the tokenizer if new")


class DataConfig(Strict):
    """One file of LLaVA records (JSON, JSONL, or either as .zst) and the folder its images are relative to."""

    path: LocalPath
    image_root: LocalPath


class HeadConfig(Strict):
    """Shape of the visual head's depth transformer; the defaults are those of the ASVR release."""

    width: PositiveInt = 2048
    layers: PositiveInt = 3
    heads: PositiveInt = 16
    ffn: PositiveInt = 4096

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"head width {self.width} is not a multiple of its {self.heads} heads")
        return self


class CodesObjective(Strict):
    """ASVR: predict the codes of the manifests at the image positions, beside the text loss."""

    kind: Literal["codes"] = "codes"
    shift: Literal["none", "next"] = Field(
        default="none", description="hidden state i predicts codes i (`none`, as published) or i+1 (`next`)"
    )
    weight: NonNegativeFloat = 1.0
    head: HeadConfig = HeadConfig()


class NoneObjective(Strict):
    """LLaVA-1.5: the text loss alone."""

    kind: Literal["none"] = "none"


Objective = Annotated[CodesObjective | NoneObjective, Field(discriminator="kind")]


class PhaseConfig(Strict):
    """One pass of training with its own data, objective, trainable parts and schedule.

    Defaults left at None follow LLaVA-1.5's table by the phase's name, see `with_defaults`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="also the folder below the run's output")
    data: tuple[DataConfig, ...] = Field(min_length=1)
    manifests: tuple[ManifestRef, ...] = Field(
        default=(),
        description="folders; in a recipe also names of sets. With objective none they give the geometry and leave out "
        "what was rejected, so that it trains on the samples that codes would train on",
    )
    objective: Objective = CodesObjective()
    trainable: tuple[Part, ...] | None = None
    template: TemplateName | None = None
    geometry: Geometry | None = Field(default=None, description="default: that of the manifests")
    lr: PositiveFloat | None = None
    batch_size: PositiveInt | None = Field(default=None, description="samples per optimizer step, over all ranks")
    micro_batch_size: PositiveInt = Field(default=8, description="samples per forward pass of one rank")
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = Field(default=None, description="stop after so many steps, whatever epochs says")
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="share of the steps with rising learning rate")
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat = Field(default=1.0, description="largest global gradient norm")
    max_length: PositiveInt = Field(default=2048, description="longest sequence in tokens, image positions included")
    max_bad_rate: float = Field(default=0.01, ge=0, le=1, description="largest share of samples that may be unusable")

    @model_validator(mode="after")
    def _needs_manifests(self) -> Self:
        if self.objective.kind == "codes" and not self.manifests:
            raise ValueError(f"phase {self.name} predicts codes but names no manifests")
        if not self.manifests and self.geometry is None:
            raise ValueError(f"phase {self.name} names no manifests, so it must give its geometry")
        if self.trainable is not None and not self.trainable:
            raise ValueError(f"phase {self.name} trains nothing; give at least one of trainable's parts")
        if self.trainable and self.objective.kind == "none" and "visual_head" in self.trainable:
            raise ValueError(f"phase {self.name} has objective none, so there is no visual_head to train")
        return self

    def with_defaults(self) -> ResolvedPhase:
        """This phase with the fields left out filled from LLaVA-1.5's table.

        | field      | `pretrain`             | any other name           |
        |------------|------------------------|--------------------------|
        | trainable  | projector, visual_head | ... and language_model   |
        | template   | plain                  | vicuna_v1                |
        | lr         | 1e-3                   | 2e-5                     |
        | batch_size | 256                    | 128                      |
        """
        pretrain = self.name == PRETRAIN
        parts: list[Part] = ["projector"]
        if self.objective.kind != "none":
            parts.append("visual_head")
        if not pretrain:
            parts.append("language_model")
        table: dict[str, Any] = {
            "trainable": tuple(parts),
            "template": "plain" if pretrain else "vicuna_v1",
            "lr": 1e-3 if pretrain else 2e-5,
            "batch_size": 256 if pretrain else 128,
        }
        given = {name: getattr(self, name) for name in PhaseConfig.model_fields}
        return ResolvedPhase(**{**given, **{k: v for k, v in table.items() if given[k] is None}})


class ResolvedPhase(PhaseConfig):
    """A phase whose every value is known, apart from a geometry that its manifests give."""

    trainable: tuple[Part, ...]
    template: TemplateName
    lr: PositiveFloat
    batch_size: PositiveInt


class TrainConfig(Strict):
    """A whole run: `OUTPUT/PHASE/step_N` checkpoints of every phase, one after the other."""

    output: LocalPath
    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    model: ModelConfig
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="DeepSpeed settings, merged over the derived ones; ZeRO stage 1 by default"
    )
    save_every: PositiveInt = Field(default=1000, description="steps between checkpoints; the last step is always kept")
    keep_last: PositiveInt = Field(default=2, description="complete checkpoints of a phase that are kept")
    log_every: PositiveInt = Field(default=10, description="steps between lines on the console; metrics.jsonl has all")
    workers: PositiveInt = Field(default=4, description="threads of a rank that decode images")
    recompute_activations: bool = Field(
        default=False, description="keep no activations of the language model's layers: less memory, a third more time"
    )
    timeout_seconds: PositiveInt = Field(default=1800, description="how long a rank waits for the others")

    @field_validator("deepspeed")
    @classmethod
    def _no_conflicts(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in DERIVED_DEEPSPEED_KEYS:
                raise ValueError(f"deepspeed.{key} is derived from {DERIVED_DEEPSPEED_KEYS[key]}; remove it")
        zero = value.get("zero_optimization", {})
        if not isinstance(zero, dict) or zero.get("stage", 1) not in (1, 2):
            raise ValueError("deepspeed.zero_optimization.stage is 1 or 2; other stages are not supported yet")
        return value

    @model_validator(mode="after")
    def _distinct_phases(self) -> Self:
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phase names are folders of the run and must differ, but are {', '.join(names)}")
        return self

    def phase(self, name: str) -> ResolvedPhase:
        """The phase called `name`, defaults filled in; KeyError if there is none."""
        return {phase.name: phase for phase in self.phases}[name].with_defaults()

    def phase_folder(self, name: str) -> Path:
        """Where the checkpoints and metrics of a phase are."""
        return Path(self.output) / name
