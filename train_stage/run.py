"""A run: its phases one after the other, each from its newest checkpoint or from the weights of the phase before."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from manifests.errors import AsvrError, InputError, RecipeError, TrainingStopped
from manifests.fingerprint import digest
from manifests.reader import open_manifest
from manifests.schema import Geometry
from manifests.storage import Store
from train_stage import checkpoint as checkpoints
from train_stage.chat import ChatEncoder
from train_stage.codes import CodeTables, check_agreement
from train_stage.collate import Collator
from train_stage.config import ResolvedPhase, TrainConfig
from train_stage.engine import Engine, prepare_environment
from train_stage.loader import collect_steps
from train_stage.loop import Schedule, train_step
from train_stage.metrics import MetricsLog
from train_stage.model import AsvrModel, build_model, load_trainable, set_trainable
from train_stage.plan import Plan, make_plan
from train_stage.ranks import Ranks, Stopped, join_ranks, leave_ranks
from train_stage.samples import Samples, load_samples
from train_stage.tensor_files import load_weights, save_tensors
from train_stage.tokenizer import load_tokenizer
from train_stage.tower import tower_grid

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PhaseInputs:
    """What a phase is given: a model, the codes of its manifests (None if it names none), and how images become views."""

    model: AsvrModel
    codes: CodeTables | None
    geometry: Geometry
    grid: tuple[int, int]

    @property
    def codebook_sha256(self) -> str | None:
        """Of the codebook file that the visual head needs."""
        return self.codes.manifests[0].codebook.sha256 if self.codes else None


@dataclass(frozen=True)
class Prepared:
    """A phase ready to start: its model, its samples, and what makes micro-batches of them.

    `carried` names the weights that a checkpoint keeps: those trained in this phase or in one before it.
    """

    model: AsvrModel
    samples: Samples
    collator: Collator
    plan: Plan
    carried: list[str]


def run(config: TrainConfig, report: Callable[[AsvrError], None]) -> None:
    """Train every phase of `config` that is not finished. Collective: every rank calls it.

    Raises an AsvrError; or, when there are several ranks, `Stopped` on all of them after one has reported the error.
    """
    prepare_environment()
    disable_progress_bar()
    ranks = join_ranks(config.timeout_seconds)
    with ExitStack() as stack:
        stack.callback(leave_ranks)
        try:
            with ranks.together():
                if ranks.rank == 0:
                    stack.enter_context(Store.open(config.output).lease("train"))
            for phase in config.phases:
                run_phase(config, config.phase(phase.name), ranks)
                gc.collect()  # the engine and its model hold on to each other
        except Stopped as stopped:
            if stopped.speaks:
                report(stopped.error)
            ranks.barrier()  # a launcher that sees one rank end stops the others, perhaps before they have spoken
            raise


def run_phase(config: TrainConfig, phase: ResolvedPhase, ranks: Ranks) -> None:
    """Train one phase to its end, from its newest checkpoint if it has one. Collective."""
    folder = config.phase_folder(phase.name)
    with ranks.together():
        settings, newest = find_start(config, phase, ranks)
    last_step = ranks.from_first(newest.step if newest else 0)
    if ranks.from_first(int(newest is not None and newest.final)):
        log.info("phase %s is finished, at step %d", phase.name, last_step)
        return
    with ranks.together():
        prepared = prepare(config, phase)
    with ranks.together():
        check_same_samples(prepared.samples, ranks)
    describe(config, phase, prepared, ranks, last_step)

    model, plan = prepared.model, prepared.plan
    schedule = Schedule(phase.lr, plan.steps, phase.warmup_ratio)
    with ranks.together():
        engine = Engine(model, config, phase, ranks)
    with ExitStack() as stack:
        stack.callback(engine.close)
        if last_step:
            engine.load(folder / f"step_{last_step}")
        with ranks.together():
            metrics = MetricsLog(folder, last_step, plan.steps, config.log_every, writes=ranks.rank == 0)
            stack.callback(metrics.close)
        steps = collect_steps(
            plan,
            prepared.samples.lengths,
            prepared.collator,
            first_step=last_step + 1,
            rank=ranks.rank,
            world=ranks.world,
            workers=config.workers,
        )
        stack.callback(steps.close)
        for collected in steps:
            step = collected.step
            result = train_step(
                engine,
                collected,
                count_visual_targets=model.objective.count_targets,
                visual_weight=model.objective.weight,
                learning_rate=schedule(step),
                seed=config.seed,
                epoch=plan.epoch_of(step),
            )
            metrics.add(result)
            if step % config.save_every == 0 or step == plan.steps:
                save(config, phase, settings, engine, prepared, step)


def save(
    config: TrainConfig,
    phase: ResolvedPhase,
    settings: dict[str, Any],
    engine: Engine,
    prepared: Prepared,
    step: int,
) -> None:
    """Write the checkpoint of a step. Collective; complete only when every rank has written its part."""
    folder, ranks = config.phase_folder(phase.name), engine.ranks
    unfinished = folder / checkpoints.unfinished_name(step)
    engine.save(unfinished)
    with ranks.together():
        if ranks.rank == 0:
            save_weights(prepared.model, prepared.carried, unfinished / checkpoints.WEIGHTS)
            checkpoints.commit(
                folder,
                step,
                final=step == prepared.plan.steps,
                world=ranks.world,
                settings=settings,
                config=config,
                keep_last=config.keep_last,
            )


def find_start(
    config: TrainConfig, phase: ResolvedPhase, ranks: Ranks
) -> tuple[dict[str, Any], checkpoints.Checkpoint | None]:
    """What decides the phase's numbers, and the checkpoint it goes on from, None for its beginning.

    Only rank 0 looks: the others get nothing, and need nothing.

    Raises TrainingStopped if that checkpoint does not fit this configuration or number of ranks.
    """
    if ranks.rank != 0:
        return {}, None
    folder = config.phase_folder(phase.name)
    settings = checkpoints.settings_of(config, phase.name)
    checkpoints.remove_unfinished(folder)
    newest = checkpoints.newest(folder)
    if newest is not None:
        checkpoints.check_fits(newest, settings, ranks.world)
    return settings, newest


def prepare(config: TrainConfig, phase: ResolvedPhase) -> Prepared:
    """Model, samples and plan of a phase; the same on every rank."""
    inputs = open_inputs(config, phase)
    model, codes = inputs.model, inputs.codes
    earlier = earlier_weights(config, phase)
    if earlier:
        load_trainable(model, earlier)
    set_trainable(model, set(phase.trainable))
    if config.recompute_activations:
        model.llava.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    tokenizer = load_tokenizer(config.model)
    encoder = ChatEncoder(tokenizer, config.model.image_token)
    samples, report = load_samples(phase, encoder, inputs.grid[0] * inputs.grid[1], codes, config.workers)
    for line in report.lines():
        log.info("phase %s: %s", phase.name, line)
    pad = int(tokenizer.pad_token_id)
    collator = Collator(samples, codes, inputs.geometry, inputs.grid, encoder.image_token_id, pad)
    plan = make_plan(config.seed, len(samples), phase.batch_size, phase.micro_batch_size, phase.epochs, phase.max_steps)
    return Prepared(model, samples, collator, plan, carried=sorted({*trainable_names(model), *earlier}))


def open_inputs(config: TrainConfig, phase: ResolvedPhase) -> PhaseInputs:
    """Manifests and model of a phase, before any of its samples; InputError if they do not fit each other."""
    manifests = [open_manifest(path) for path in phase.manifests]
    if manifests:
        check_agreement(manifests)
    geometry = phase_geometry(phase, [manifest.manifest.geometry for manifest in manifests])
    # Also for a phase that predicts no codes: it sees the very pictures that one which does would see.
    codes = CodeTables(manifests) if manifests else None
    predicts = phase.objective.kind == "codes"
    model = build_model(
        config.model,
        phase.objective,
        codes.codebooks() if codes and predicts else None,
        _DTYPES[config.precision],
        residual=codes.tokenizer.residual if codes else True,
        seed=config.seed,
    )
    grid = tower_grid(model.vision_tower.config, geometry.size)
    if codes is not None and predicts and codes.tokenizer.grid != grid:
        raise InputError(
            f"the manifests of phase {phase.name} have {codes.tokenizer.grid[0]}x{codes.tokenizer.grid[1]} positions a "
            f"view and the vision tower {config.model.vision_tower} makes {grid[0]}x{grid[1]}: use a tower with the "
            "tokenizer's grid, or tokenize for this one"
        )
    return PhaseInputs(model, codes, geometry, grid)


def trainable_names(model: AsvrModel) -> list[str]:
    """The names of the parameters that train."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def phase_geometry(phase: ResolvedPhase, found: list[Geometry]) -> Geometry:
    """The geometry of a phase: its manifests', which its own must equal if it gives one; else its own."""
    own = phase.geometry
    if not found:
        if own is None:
            raise RecipeError(f"phase {phase.name} names no manifests, so it must give its geometry")
        return own
    if own is not None and own != found[0]:
        raise InputError(
            f"phase {phase.name} asks for geometry {own.model_dump_json()} but its manifests have "
            f"{found[0].model_dump_json()}: remove geometry from the phase, or tokenize again"
        )
    return found[0]


def earlier_weights(config: TrainConfig, phase: ResolvedPhase) -> dict[str, torch.Tensor]:
    """The weights that the phase before this one ended with; empty for the first phase."""
    position = [other.name for other in config.phases].index(phase.name)
    if position == 0:
        return {}
    before = config.phases[position - 1].name
    last = checkpoints.newest(config.phase_folder(before))
    if last is None or not last.final:
        raise TrainingStopped(f"phase {phase.name} starts from the end of phase {before}, which is not there")
    return load_weights(last.weights)


def save_weights(model: AsvrModel, names: list[str], path: Path) -> None:
    """Write the named parameters as safetensors, each with memory of its own."""
    own = dict(model.named_parameters())
    save_tensors({name: own[name].detach().to("cpu", copy=True).contiguous() for name in names if name in own}, path)


def check_same_samples(samples: Samples, ranks: Ranks) -> None:
    """InputError if ranks see different data, which would go wrong silently. Collective."""
    own = digest([samples.names, samples.lengths.tolist(), samples.ids.size, int(samples.ids.sum())])
    if len(set(ranks.gather([own]))) > 1:
        raise InputError(
            "the ranks do not see the same samples: data, images and manifests must be the same files on every machine"
        )


def describe(config: TrainConfig, phase: ResolvedPhase, prepared: Prepared, ranks: Ranks, last_step: int) -> None:
    """Say what is about to happen, in derived numbers."""
    plan, count = prepared.plan, len(prepared.samples)
    trainable = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in prepared.model.parameters())
    lengths = prepared.samples.lengths
    rest = count % phase.batch_size
    lines = [
        f"{count} samples in steps of {phase.batch_size}: {plan.steps_per_epoch} steps an epoch, {plan.steps} in all"
        + (f"; the last step of an epoch has {rest} samples" if rest else ""),
        f"{lengths.mean():.0f} tokens a sample on average, {lengths.max()} at most",
        f"{ranks.world} rank(s) on {ranks.device.type}, micro-batches of {phase.micro_batch_size}, {config.precision}",
        f"{trainable:,} of {total:,} parameters train ({', '.join(phase.trainable)}), learning rate {phase.lr:g}",
    ]
    if last_step:
        lines.append(f"{last_step} steps are done")
    for line in lines:
        log.info("phase %s: %s", phase.name, line)
