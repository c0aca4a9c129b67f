"""What a training run is: the model, its phases, and how they are run. Torch-free: a recipe is checked in no time.

The pipeline resolves names and relative paths of a recipe and writes the result as `RUN/config.json`;
`python -m train_stage RUN/config.json` reads exactly that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from manifests.paths import HubOrPath, LocalPath, ManifestRef, StorePath
from manifests.schema import Geometry
from train_stage import deepspeed_settings
from train_stage.lora_config import LoraConfig as LoraConfig
from train_stage.objective_config import AlignObjective as AlignObjective
from train_stage.objective_config import CodesObjective as CodesObjective
from train_stage.objective_config import DenoiseObjective as DenoiseObjective
from train_stage.objective_config import HeadConfig as HeadConfig
from train_stage.objective_config import NoneObjective as NoneObjective
from train_stage.objective_config import Objective, terms_of
from train_stage.objective_config import ParallelHeadConfig as ParallelHeadConfig
from train_stage.objective_config import Term as Term
from train_stage.parity import Parity
from train_stage.strict import Strict

Part = Literal["projector", "visual_head", "language_model"]
"""What a phase may train; the vision tower stays frozen always."""

TemplateName = Literal["plain", "vicuna_v1", "mistral", "llama3", "qwen2", "tokenizer"]

PRETRAIN = "pretrain"
"""The phase name that has LLaVA-1.5's defaults of feature alignment; any other name has those of instruction tuning."""

CONFIG_NAME = "config.json"
"""In a run's folder what it is or was trained with, for people and for what comes after training."""

RUN_NAMES = frozenset({CONFIG_NAME, "eval", "export", "export.tmp", "report.html"})
"""What a run's folder holds beside its phases."""

MANIFESTS = "manifests"
"""The group of a phase's own manifests beside those of its terms, which therefore cannot have this name."""

VISION_FEATURES = "vision_features"
"""The group of manifests that hold the tower's output."""

INPUT_CODES = "input_codes"
"""The group of manifests whose codes a discrete model is shown."""


class ModelConfig(Strict):
    """The LLaVA model: any causal language model and any SigLIP, CLIP or DINOv2 style tower, as folder or hub id.

    Or a LLaVA that is there already, which then stands for both of them.
    """

    language_model: HubOrPath = Field(description="folder or hub id of a causal language model")
    tokenizer: HubOrPath | None = Field(default=None, description="folder or hub id; default: that of language_model")
    vision_tower: HubOrPath = Field(description="folder or hub id of a Hugging Face vision encoder")
    vision_feature_layer: int = Field(default=-2, description="which of the tower's hidden_states; LLaVA's is -2")
    image_token: str = Field(default="<image>", description="placeholder of an image, added to the tokenizer if new")
    llava: HubOrPath | None = Field(
        default=None,
        description="folder or hub id of a Hugging Face LLaVA or LLaVA-NeXT, instead of language_model and vision_tower: "
        "training goes on from these two, its projector and its newline",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_llava_is_both(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("llava") is None:
            return value
        for part in ("language_model", "vision_tower"):
            if value.get(part) not in (None, value["llava"]):
                raise ValueError(f"model gives both llava and {part}, which a LLaVA brings along: remove one of them")
        return {**value, "language_model": value["llava"], "vision_tower": value["llava"]}


class DataConfig(Strict):
    """One file of LLaVA records (JSON, JSONL, or either as .zst) and the folder its images are relative to."""

    path: LocalPath
    image_root: StorePath = Field(
        description="folder or URL. An `image` is a file below it, or an image id of the phase's manifests that lies in a "
        "tar, Parquet or Arrow file below it"
    )
    ratio: PositiveFloat = Field(
        default=1.0, description="how often an epoch goes through the file: 0.5 takes a fixed half of it, 2 repeats it"
    )


class ValidationConfig(Strict):
    """Held-out samples of a phase: the losses of training on them, every so many steps and after the last."""

    data: tuple[DataConfig, ...] = Field(min_length=1)
    manifests: tuple[ManifestRef, ...] = Field(
        default=(),
        description="token sets of the held-out images, each with the settings of one of the phase's; default: the phase's "
        "own, which then have to hold these images too",
    )
    every: PositiveInt | None = Field(
        default=None, description="steps between validations; default: after the last only"
    )


class EvalConfig(Strict):
    """What `asvr eval` measures of a run, and `asvr run` after its export: held-out losses and answers."""

    data: tuple[DataConfig, ...] = Field(
        default=(), description="held-out records; default: what the last phase is validated on"
    )
    manifests: tuple[ManifestRef, ...] = Field(
        default=(),
        description="token sets of the held-out images, as in validation; default: those of the data that is used",
    )
    limit: PositiveInt | None = Field(default=None, description="ask the first so many questions only; default: all")


class PhaseConfig(Strict):
    """One pass of training with its own data, objective, trainable parts and schedule.

    Defaults left at None follow LLaVA-1.5's table by the phase's name, see `with_defaults`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="also the folder below the run's output")
    data: tuple[DataConfig, ...] = Field(min_length=1)
    manifests: tuple[ManifestRef, ...] = Field(
        default=(),
        description="folders; in a recipe also names of sets. Terms of kind codes predict these unless they name their "
        "own. With objective none they give the geometry and leave out what was rejected, so that it trains on the "
        "samples that codes would train on",
    )
    vision_features: tuple[ManifestRef, ...] = Field(
        default=(),
        description="sets of kind features with the output of model.vision_tower at model.vision_feature_layer, which is "
        "then read instead of computed in every step",
    )
    input_codes: tuple[ManifestRef, ...] = Field(
        default=(),
        description="sets of codes whose vectors the language model is shown instead of the tower's output; the same "
        "tokenizer in every phase. Such a model is exported in a form of its own",
    )
    objective: Objective = CodesObjective()
    trainable: tuple[Part, ...] | None = None
    template: TemplateName | None = None
    geometry: Geometry | None = Field(default=None, description="default: that of the manifests")
    lr: PositiveFloat | None = Field(default=None, description="peak learning rate")
    part_lr: dict[Part, PositiveFloat] = Field(
        default_factory=dict, description="peak learning rates of single parts; those left out have lr"
    )
    lora: LoraConfig | None = Field(
        default=None,
        description="train the language model through adapters of low rank; part_lr.language_model is theirs",
    )
    batch_size: PositiveInt | None = Field(default=None, description="samples per optimizer step, over all ranks")
    micro_batch_tokens: PositiveInt | None = Field(
        default=None,
        description="most tokens of a forward pass of one rank, into which samples are packed end to end without padding; "
        "default: four times max_length",
    )
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = Field(default=None, description="stop after so many steps, whatever epochs says")
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="share of the steps with rising learning rate")
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat = Field(default=1.0, description="largest global gradient norm")
    max_length: PositiveInt = Field(default=2048, description="longest sequence in tokens, image positions included")
    max_bad_rate: float = Field(default=0.01, ge=0, le=1, description="largest share of samples that may be unusable")
    reference_parity: Parity = Field(
        default=None, description="for comparisons: true for the losses of the published code, or which of its habits"
    )
    validation: ValidationConfig | None = Field(
        default=None, description="held-out samples; changes nothing that is learned"
    )

    @property
    def terms(self) -> tuple[Term, ...]:
        """The objective as a list of terms, empty for `none`."""
        return terms_of(self.objective)

    def manifests_of(self, term: Term) -> tuple[str, ...]:
        """The manifests a term is trained against, empty where it needs none."""
        return term.manifests or (self.manifests if term.kind == "codes" else ())

    @model_validator(mode="after")
    def _needs_manifests(self) -> Self:
        names = [term.name for term in self.terms]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"phase {self.name} has several objectives named {twice}: give each a name of its own")
        reserved = {MANIFESTS, VISION_FEATURES, INPUT_CODES, "text"} & set(names)
        if reserved:
            raise ValueError(f"phase {self.name} has an objective named {reserved.pop()}: give it another name")
        for term in self.terms:
            if term.kind == "codes" and not self.manifests_of(term):
                raise ValueError(f"phase {self.name} predicts codes but names no manifests")
        tower_term = next((term.name for term in self.terms if getattr(term, "tower_layer", None) is not None), None)
        if self.vision_features and self.input_codes:
            raise ValueError(
                f"phase {self.name} gives both vision_features and input_codes: an image is the one or the other"
            )
        instead = VISION_FEATURES if self.vision_features else INPUT_CODES if self.input_codes else None
        if instead is not None and tower_term is not None:
            raise ValueError(
                f"phase {self.name} reads {instead} instead of running the tower, which objective {tower_term} "
                f"looks into: give it manifests instead of tower_layer, or leave out {instead}"
            )
        if not self.all_manifests and self.geometry is None:
            raise ValueError(f"phase {self.name} names no manifests, so it must give its geometry")
        if not self.all_manifests and self.geometry is not None and self.geometry.mode == "anyres":
            raise ValueError(
                f"phase {self.name} has geometry anyres, where the size of a picture decides how many tokens it is, and "
                "names no manifests, which know the sizes: give manifests; with objective none they serve that alone"
            )
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < self.max_length:
            raise ValueError(
                f"phase {self.name} has micro_batch_tokens {self.micro_batch_tokens}, into which a sample of max_length "
                f"{self.max_length} does not fit: raise the one or lower the other"
            )
        if self.trainable is not None and not self.trainable:
            raise ValueError(f"phase {self.name} trains nothing; give at least one of trainable's parts")
        if self.trainable and not self.terms and "visual_head" in self.trainable:
            raise ValueError(f"phase {self.name} has objective none, so there is no visual_head to train")
        idle = sorted(set(self.part_lr) - set(self.trainable or self._usual_parts()))
        if idle:
            raise ValueError(f"phase {self.name} does not train its {idle[0]}; remove it from part_lr")
        if self.lora is not None and "language_model" not in (self.trainable or self._usual_parts()):
            raise ValueError(
                f"phase {self.name} has lora, which trains the language_model, but does not train that part: add it to "
                "trainable, or remove lora"
            )
        return self

    def _usual_parts(self) -> tuple[Part, ...]:
        """What a phase trains that does not say so."""
        parts: list[Part] = ["projector"]
        if self.terms:
            parts.append("visual_head")
        if self.name != PRETRAIN:
            parts.append("language_model")
        return tuple(parts)

    @property
    def all_manifests(self) -> dict[str, tuple[str, ...]]:
        """Every group of manifests of the phase by what it is for: `manifests`, `vision_features`, `input_codes`, or the
        name of a term."""
        groups = {MANIFESTS: self.manifests, VISION_FEATURES: self.vision_features, INPUT_CODES: self.input_codes}
        groups |= {term.name: self.manifests_of(term) for term in self.terms}
        return {name: group for name, group in groups.items() if group}

    def with_defaults(self) -> ResolvedPhase:
        """This phase with the fields left out filled from LLaVA-1.5's table.

        | field      | `pretrain`             | any other name           |
        |------------|------------------------|--------------------------|
        | trainable  | projector, visual_head | ... and language_model   |
        | template   | plain                  | vicuna_v1                |
        | lr         | 1e-3                   | 2e-5                     |
        | batch_size | 256                    | 128                      |

        micro_batch_tokens is four times max_length in both.
        """
        pretrain = self.name == PRETRAIN
        table: dict[str, Any] = {
            "trainable": self._usual_parts(),
            "template": "plain" if pretrain else "vicuna_v1",
            "lr": 1e-3 if pretrain else 2e-5,
            "batch_size": 256 if pretrain else 128,
            "micro_batch_tokens": 4 * self.max_length,
        }
        given = {name: getattr(self, name) for name in PhaseConfig.model_fields}
        return ResolvedPhase(**{**given, **{k: v for k, v in table.items() if given[k] is None}})


class ResolvedPhase(PhaseConfig):
    """A phase whose every value is known, apart from a geometry that its manifests give."""

    trainable: tuple[Part, ...]
    template: TemplateName
    lr: PositiveFloat
    batch_size: PositiveInt
    micro_batch_tokens: PositiveInt


class TrainConfig(Strict):
    """A whole run: `OUTPUT/PHASE/step_N` checkpoints of every phase, one after the other."""

    output: LocalPath
    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    model: ModelConfig
    init_from: LocalPath | None = Field(
        default=None,
        description="RUN/PHASE, a finished phase of another run with the same model, whose weights the first phase starts with",
    )
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    eval: EvalConfig | None = Field(
        default=None, description="what is measured when the run is done; {} for all defaults, left out for nothing"
    )
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
    compile_layers: bool = Field(
        default=False, description="torch.compile the language model's layers; not with ZeRO 3, which hooks into them"
    )
    timeout_seconds: PositiveInt = Field(
        default=1800, description="how long a rank waits for the others before the run ends"
    )

    @field_validator("deepspeed")
    @classmethod
    def _no_conflicts(cls, value: dict[str, Any]) -> dict[str, Any]:
        deepspeed_settings.check(value)
        return value

    @model_validator(mode="after")
    def _compiled_layers_are_whole(self) -> Self:
        if self.compile_layers and deepspeed_settings.stage_of(self.deepspeed) == 3:
            raise ValueError(
                "compile_layers is for layers that are whole, which ZeRO 3 takes apart: use stage 1 or 2, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _distinct_phases(self) -> Self:
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phase names are folders of the run and must differ, but are {', '.join(names)}")
        taken = next((name for name in names if name in RUN_NAMES), None)
        if taken is not None:
            raise ValueError(f"a phase cannot be called {taken}, a name that something else in the run's folder has")
        return self

    @model_validator(mode="after")
    def _evaluates_something(self) -> Self:
        if self.eval is not None and not self.eval.data and self.phases[-1].validation is None:
            raise ValueError(
                f"eval names no data, and the last phase, {self.phases[-1].name}, has no validation data: give eval.data"
            )
        return self

    def phase(self, name: str) -> ResolvedPhase:
        """The phase called `name`, defaults filled in; KeyError if there is none."""
        return {phase.name: phase for phase in self.phases}[name].with_defaults()

    def phase_folder(self, name: str) -> Path:
        """Where the checkpoints and metrics of a phase are."""
        return Path(self.output) / name


def config_bytes(config: TrainConfig) -> bytes:
    """What stands in `CONFIG_NAME`."""
    return (config.model_dump_json(indent=2) + "\n").encode()
