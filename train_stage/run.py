"""A run: its phases one after the other, each from its newest checkpoint or from the weights of the phase before."""

from __future__ import annotations

import gc
import logging
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from manifests.atomic import storage_errors
from manifests.errors import AsvrError, EnvironmentProblem, InputError, RankLost, TrainingStopped
from manifests.fingerprint import digest
from manifests.storage import Store
from train_stage import checkpoint as checkpoints
from train_stage.config import CONFIG_NAME, ResolvedPhase, TrainConfig, config_bytes
from train_stage.cost import flop_model
from train_stage.deepspeed_process import prepare_environment
from train_stage.engine import Engine
from train_stage.loader import collect_steps
from train_stage.loop import Schedule, train_step
from train_stage.metrics import Meter, MetricsLog
from train_stage.monitors import Monitors
from train_stage.packing import FixedRows
from train_stage.phase_data import PhaseData, load_ahead
from train_stage.prepare import Prepared, prepare
from train_stage.ranks import Ranks, Stopped, join_ranks, leave_ranks, lost_ranks_named
from train_stage.samples import Samples
from train_stage.stopping import Stop, Stopper
from train_stage.tensor_files import save_tensors
from train_stage.validation import validate

log = logging.getLogger(__name__)


def run(config: TrainConfig, report: Callable[[AsvrError], None], stopper: Stopper) -> Stop | None:
    """Train every phase of `config` that is not finished, or until `stopper` says so. Collective: every rank calls it.

    Returns why it ended early, if it did; what was done is saved then. Raises an AsvrError; or, when there are several
    ranks, `Stopped` on all of them after one has reported the error. RankLost where another rank is gone or silent.
    """
    prepare_environment()
    disable_progress_bar()
    ahead = load_ahead(config)
    with ExitStack() as stack:
        stack.enter_context(lost_ranks_named(config.timeout_seconds, config.output))
        ranks = join_ranks(config.timeout_seconds)
        stack.callback(leave_ranks)
        try:
            ranks.share_error(ahead.error)
            with ranks.together():
                if ranks.rank == 0:
                    store = Store.open(config.output)
                    stack.enter_context(store.lease("train"))
                    # Again: until now another call, which is refused by the lease, may have put its own there.
                    store.write(CONFIG_NAME, config_bytes(config))
            check_same_output(config.output, ranks)
            for phase in config.phases:
                own, settings = ahead.phases.pop(phase.name, None), ahead.settings.get(phase.name)
                stop = run_phase(config, config.phase(phase.name), ranks, own, stopper, settings)
                gc.collect()  # the engine and its model hold on to each other
                if stop is not None:
                    return stop
        except Stopped as stopped:
            if stopped.speaks:
                report(stopped.error)
            with suppress(RankLost), lost_ranks_named(config.timeout_seconds, config.output):
                ranks.barrier()  # a launcher that sees one rank end stops the others, perhaps before they have spoken
            raise
    return None


def run_phase(
    config: TrainConfig,
    phase: ResolvedPhase,
    ranks: Ranks,
    data: PhaseData | None,
    stopper: Stopper,
    settings: dict[str, Any] | None = None,
) -> Stop | None:
    """Train one phase to its end, from its newest checkpoint if it has one; or until `stopper` says so. Collective.

    `data` and `settings`: as `load_ahead` gives them, if they are there.
    """
    folder = config.phase_folder(phase.name)
    with ranks.together():
        settings, newest = find_start(config, phase, ranks, settings)
    last_step = ranks.from_first(newest.step if newest else 0)
    written_by = ranks.from_first(newest.world if newest else ranks.world)
    if ranks.from_first(int(newest is not None and newest.final)):
        log.info("phase %s is finished, at step %d", phase.name, last_step)
        return None
    with ranks.together():
        prepared = prepare(config, phase, data)
    with ranks.together():
        check_same_samples(prepared.samples, ranks)
        if prepared.held_out:
            check_same_samples(prepared.held_out.samples, ranks)
    identity = prepared.samples.identity() if ranks.rank == 0 else None
    with ranks.together():
        if newest is not None and identity is not None:
            checkpoints.check_samples(newest, identity)
    describe(config, phase, prepared, ranks, last_step)

    model, plan = prepared.model, prepared.plan
    flops = flop_model(model, prepared.collator.geometry.size)  # before ZeRO takes the weights apart
    own_lr = {str(part): rate / phase.lr for part, rate in phase.part_lr.items()}
    meter = Meter.of(flops, ranks.world, ranks.device, config.precision, own_lr)
    schedule = Schedule(phase.lr, plan.steps, phase.warmup_ratio)
    with ranks.together(), enough_memory(phase, ranks):
        engine = Engine(model, config, phase, ranks, written_by=written_by)
    with enough_memory(phase, ranks), ExitStack() as stack:
        stack.callback(engine.close)
        if last_step:
            engine.load(folder / f"step_{last_step}")
        with ranks.together():
            monitors = Monitors(config.deepspeed, folder)
            metrics = MetricsLog(
                folder, last_step, plan.steps, config.log_every, meter, monitors.write, writes=ranks.rank == 0
            )
            stack.callback(metrics.close)

        def look(step: int) -> None:
            if prepared.held_out and is_due(phase, step, plan.steps):
                validation = validate(
                    engine, model, prepared.held_out, ranks, step=step, seed=config.seed, workers=config.workers
                )
                metrics.add_validation(validation)

        if last_step == plan.steps:  # only its validation is missing, which could not be made then
            look(last_step)
            with ranks.together():
                if newest is not None:
                    checkpoints.finish(newest)
            return None
        steps = collect_steps(
            plan,
            prepared.packing,
            prepared.collator,
            first_step=last_step + 1,
            rank=ranks.rank,
            world=ranks.world,
            workers=config.workers,
        )
        stack.callback(steps.close)
        stack.enter_context(stopper.listening())
        for collected in steps:
            step = collected.step
            result = train_step(
                engine,
                collected,
                terms=model.terms,
                learning_rate=schedule(step),
                seed=config.seed,
                epoch=plan.epoch_of(step),
                average_micro_batches=isinstance(prepared.packing, FixedRows),
            )
            metrics.add(result)
            try:
                look(step)
            except (AsvrError, Stopped) as error:
                if not isinstance(error.error if isinstance(error, Stopped) else error, TrainingStopped):
                    save(config, phase, settings, engine, prepared, step, identity, final=False)
                raise
            stop = stopper.after_step(ranks)
            if stop is not None or step % config.save_every == 0 or step == plan.steps:
                save(config, phase, settings, engine, prepared, step, identity, final=step == plan.steps)
            if stop is not None and not (step == plan.steps and phase.name == config.phases[-1].name):
                log.info("phase %s: %s, so it ends after step %d, which is saved", phase.name, stop.reason, step)
                return stop
    return None


@contextmanager
def enough_memory(phase: ResolvedPhase, ranks: Ranks) -> Iterator[None]:
    """EnvironmentProblem for what torch says of a full GPU in a block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"the GPU of rank {ranks.rank} has too little memory for phase {phase.name} with micro_batch_tokens "
            f"{phase.micro_batch_tokens}: lower that (max_length is its least), set recompute_activations, cut more with a "
            "higher ZeRO stage or over more GPUs, or offload the optimizer; asvr train --check estimates what each takes"
        ) from error


def save(
    config: TrainConfig,
    phase: ResolvedPhase,
    settings: dict[str, Any],
    engine: Engine,
    prepared: Prepared,
    step: int,
    identity: dict[str, Any] | None,
    *,
    final: bool,
) -> None:
    """Write the checkpoint of a step. Collective; complete only when every rank has written its part."""
    folder, ranks = config.phase_folder(phase.name), engine.ranks
    unfinished = folder / checkpoints.unfinished_name(step)
    engine.save(unfinished)
    weights = engine.weights(prepared.carried)
    with ranks.together():
        if ranks.rank == 0:
            save_tensors(weights, unfinished / checkpoints.WEIGHTS)
            checkpoints.commit(
                folder,
                step,
                final=final,
                world=ranks.world,
                settings=settings,
                config=config,
                keep_last=config.keep_last,
                samples=identity,
            )


def is_due(phase: ResolvedPhase, step: int, last: int) -> bool:
    """Whether a phase is validated after a step."""
    every = phase.validation.every if phase.validation else None
    return step == last or bool(every and step % every == 0)


def find_start(
    config: TrainConfig, phase: ResolvedPhase, ranks: Ranks, settings: dict[str, Any] | None
) -> tuple[dict[str, Any], checkpoints.Checkpoint | None]:
    """What decides the phase's numbers, and the checkpoint it goes on from, None for its beginning.

    `settings`: as `load_ahead` gives them, if they are there. Only rank 0 looks: the others get nothing, and need nothing.

    Raises TrainingStopped if that checkpoint does not fit this configuration, or if the model, of which nothing is read
    ahead, is another than at the start of the run.
    """
    if ranks.rank != 0:
        return {}, None
    folder = config.phase_folder(phase.name)
    if settings is None:
        settings = checkpoints.settings_of(config, phase.name)
    else:
        checkpoints.check_model(config, settings)
    checkpoints.remove_unfinished(folder)
    newest = checkpoints.newest(folder)
    if newest is not None:
        checkpoints.check_fits(newest, settings)
        if not newest.final:
            checkpoints.name_other_versions(newest)
    return settings, newest


def check_same_samples(samples: Samples, ranks: Ranks) -> None:
    """InputError if ranks see different data, which would go wrong silently. Collective."""
    own = digest([samples.names, samples.lengths.tolist(), samples.ids.size, int(samples.ids.sum())])
    if len(set(ranks.gather([own]))) > 1:
        raise InputError(
            "the ranks do not see the same samples: data, images and manifests must be the same files on every machine"
        )


def check_same_output(output: str, ranks: Ranks, *, patience: float = 10.0) -> None:
    """InputError if ranks write to different folders of one name, whose checkpoints would be cut apart. Collective.

    `patience`: seconds that a network file system may take to show a new file.
    """
    sign = Path(output) / f".asvr-{ranks.gather([secrets.token_hex(8)])[0]}"
    with ranks.together(), storage_errors("write", sign):
        if ranks.rank == 0:
            sign.touch()
    deadline = time.monotonic() + patience
    while not sign.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        with ranks.together():
            if not sign.exists():
                raise InputError(
                    f"rank {ranks.rank}, on {platform.node()}, does not see what rank 0 writes to {output}: that has to be one "
                    "folder for all machines, where each rank writes its part of a checkpoint"
                )
    finally:
        if ranks.rank == 0:
            sign.unlink(missing_ok=True)


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
        f"{ranks.world} rank(s) on {ranks.device.type}, micro-batches of at most {phase.micro_batch_tokens} tokens, {config.precision}",
        f"{trainable:,} of {total:,} parameters train ({', '.join(phase.trainable)}), learning rate {phase.lr:g}",
    ]
    if last_step:
        lines.append(f"{last_step} steps are done")
    for line in lines:
        log.info("phase %s: %s", phase.name, line)
