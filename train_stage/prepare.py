"""A phase made ready to start: its model with the weights it begins with, and what makes its micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from manifests.errors import TrainingStopped
from manifests.schema import FeaturesSpec, Geometry
from train_stage import checkpoint as checkpoints
from train_stage import stored_features
from train_stage.attention import compile_layers
from train_stage.build import build_model
from train_stage.collate import Collator
from train_stage.config import INPUT_CODES, VISION_FEATURES, ResolvedPhase, TrainConfig, ValidationConfig
from train_stage.discrete_input import show_codes
from train_stage.lora import add_adapters
from train_stage.model import AsvrModel
from train_stage.objectives import Target
from train_stage.packing import CostModel, FixedRows, Packing
from train_stage.parts import load_trainable, set_trainable
from train_stage.phase_data import PhaseData, load_data, open_tables, read_held_out
from train_stage.plan import Plan, make_plan
from train_stage.samples import Samples
from train_stage.tables import Tables
from train_stage.tensor_files import load_weights
from train_stage.tower import tower_grid
from train_stage.validation import HeldOut

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PhaseInputs:
    """What a phase is given: a model, the tables of each group of its manifests, and how images become views."""

    model: AsvrModel
    tables: dict[str, Tables]
    geometry: Geometry
    grid: tuple[int, int]


@dataclass(frozen=True)
class Prepared:
    """A phase ready to start: its model, its samples, which of them a step takes, and what makes micro-batches of them.

    `carried` names the weights that a checkpoint keeps: those trained in this phase or in one before it.
    """

    model: AsvrModel
    samples: Samples
    collator: Collator
    plan: Plan
    packing: Packing | FixedRows
    carried: list[str]
    held_out: HeldOut | None = None


def prepare(config: TrainConfig, phase: ResolvedPhase, data: PhaseData | None = None) -> Prepared:
    """Model, samples and plan of a phase; the same on every rank. `data`: as `load_data` gives it, if it is there."""
    data = data or load_data(config, phase)
    inputs = with_model(config, phase, data.tables, data.geometry)
    model = inputs.model
    earlier = earlier_weights(config, phase)
    if earlier:
        load_trainable(model, earlier)
    set_trainable(model, set(phase.trainable))
    carried = sorted({*trainable_names(model), *earlier})
    if phase.lora is not None:
        add_adapters(model, phase.lora, config.seed)
    model.train()  # Transformers hands its models out in evaluation mode, in which no layer recomputes or drops out
    if config.recompute_activations:
        model.llava.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile_layers:
        compile_layers(model.llava.model.language_model)

    samples, collator, parity = data.samples, data.collator, phase.reference_parity
    if VISION_FEATURES in data.tables:
        check_stored_features(model, collator, data.tables[VISION_FEATURES])
    plan = make_plan(config.seed, len(samples), phase.batch_size, phase.epochs, phase.max_steps)
    packing: Packing | FixedRows
    if parity is not None and parity.micro_batch_size is not None:
        packing = FixedRows(parity.micro_batch_size)
    else:
        packing = Packing(samples.lengths, cost_model(model)(samples.lengths), phase.micro_batch_tokens)
    held_out = hold_out(config, phase, phase.validation, inputs, data.held_out) if phase.validation else None
    return Prepared(model, samples, collator, plan, packing, carried, held_out)


def hold_out(
    config: TrainConfig,
    phase: ResolvedPhase,
    validation: ValidationConfig,
    inputs: PhaseInputs,
    read: tuple[Samples, Collator] | None = None,
) -> HeldOut:
    """The held-out samples of a phase, read and joined as its own are. `read`: as `read_held_out` gives them, if there."""
    samples, collator = read or read_held_out(config, phase, validation, inputs.tables, inputs.geometry)
    model = inputs.model
    if VISION_FEATURES in collator.tables:
        check_stored_features(model, collator, collator.tables[VISION_FEATURES])
    packing = Packing(samples.lengths, cost_model(model)(samples.lengths), phase.micro_batch_tokens)
    return HeldOut(samples, collator, packing, phase.batch_size)


def cost_model(model: AsvrModel) -> CostModel:
    """What a sample costs, by its tokens, in the language model's layers."""
    text = model.llava.config.text_config
    parameters = sum(parameter.numel() for parameter in model.llava.model.language_model.parameters())
    return CostModel.of(
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        layer_parameters=parameters - model.llava.get_input_embeddings().weight.numel(),
    )


def open_inputs(config: TrainConfig, phase: ResolvedPhase) -> PhaseInputs:
    """Manifests and model of a phase, before any of its samples; InputError if they do not fit each other."""
    return with_model(config, phase, *open_tables(phase))


def with_model(config: TrainConfig, phase: ResolvedPhase, tables: dict[str, Tables], geometry: Geometry) -> PhaseInputs:
    """The model beside what is known of the manifests; InputError if they do not fit each other."""
    model = build_model(
        config.model,
        phase.terms,
        {term.name: target_of(tables[term.name]) for term in phase.terms if term.name in tables},
        _DTYPES[config.precision],
        view_size=geometry.size,
        grid_pinpoints=geometry.grid_pinpoints,
        seed=config.seed,
    )
    grid = tower_grid(model.vision_tower.config, geometry.size)
    if VISION_FEATURES in tables:
        stored = tables[VISION_FEATURES]
        stored_features.check_spec(stored.spec, model, grid, stored.where)
        model.reads_features = True
    if INPUT_CODES in tables:
        show_codes(model, target_of(tables[INPUT_CODES]), grid, config.seed)
    return PhaseInputs(model, tables, geometry, grid)


def check_stored_features(model: AsvrModel, collator: Collator, tables: Tables) -> None:
    """InputError unless the tower makes of the first picture what is stored of it."""
    samples = collator.samples
    first = next((index for index in range(len(samples)) if len(samples.images_of(index))), None)
    if first is not None and isinstance(tables.spec, FeaturesSpec):
        batch = collator(np.array([first]))
        stored = batch.targets[VISION_FEATURES][:1]
        stored_features.check_values(batch.views[:1], stored, tables.spec, model, tables.where)


def target_of(tables: Tables) -> Target:
    """What a term needs to know of its manifests."""
    first = tables.manifests[0]
    if first.manifest.codebook is None:
        return Target(tables.spec, where=tables.where)
    return Target(tables.spec, first.codebooks(), first.codebook.sha256, tables.where)


def trainable_names(model: AsvrModel) -> list[str]:
    """The names of the parameters that train."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def earlier_weights(config: TrainConfig, phase: ResolvedPhase) -> dict[str, torch.Tensor]:
    """The weights that the phase before this one ended with; for the first phase those of `init_from`, if it is given."""
    position = [other.name for other in config.phases].index(phase.name)
    if position == 0:
        return {} if config.init_from is None else load_weights(checkpoints.start_of(config).weights)
    before = config.phases[position - 1].name
    last = checkpoints.newest(config.phase_folder(before))
    if last is None or not last.final:
        raise TrainingStopped(f"phase {phase.name} starts from the end of phase {before}, which is not there")
    return load_weights(last.weights)
