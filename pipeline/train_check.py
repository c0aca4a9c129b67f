"""`asvr train --check`: what a run lacks and what it will take, before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manifests.errors import InputError, RecipeError
from pipeline.console import plain, write_line, write_table
from pipeline.extras import needs

if TYPE_CHECKING:
    from train_stage.check import PhaseReport
    from train_stage.config import TrainConfig


def check_run(config: TrainConfig, *, gpu: str, gpus: int, mfu: float) -> None:
    """Print what each phase takes on `gpus` GPUs called `gpu`; InputError after printing every problem there is.

    RecipeError for a GPU that is not in the table of peaks.
    """
    with needs("train"):
        from train_stage.check import Fleet, check
        from train_stage.flops import PEAK_BFLOAT16, peak_flops

    peak = peak_flops(gpu)
    if peak is None:
        raise RecipeError(f"--gpu {gpu}: no peak is known of it; there are {', '.join(PEAK_BFLOAT16)}")
    report = check(config, Fleet(gpus, peak, mfu))
    for phase in report.phases:
        _show(phase, gpus)
    if report.phases:
        write_line(
            f"hours: FLOPs / ({gpus} x {gpu} of {peak / 1e12:,.0f} TFLOP/s x MFU {mfu:g}, an assumption), without loading "
            "and saving; FLOPs, memory and disk are estimates from shapes and from the first records"
        )
    for note in report.notes:
        write_line(plain(f"note: {note}"))
    for problem in report.problems:
        write_line(plain(f"problem: {problem}"))
    if report.problems:
        raise InputError(f"{len(report.problems)} problem(s) keep this run from starting; they are listed above")
    write_line("no problem was found")


def _show(phase: PhaseReport, gpus: int) -> None:
    memory = phase.memory
    rows: list[tuple[str, str]] = [
        (part.name, f"{part.parameters:,} parameters, {'trains' if part.trained else 'frozen'}")
        for part in phase.parts
        if part.parameters
    ]
    rows += [
        ("samples", f"about {phase.samples:,}, {phase.tokens:,.0f} tokens on average"),
        ("steps", f"{phase.steps:,}"),
        ("FLOPs", f"{phase.flops:.3g}"),
        ("hours", f"{phase.hours:,.1f}"),
        (
            f"memory of each of {gpus} GPU(s)",
            f"{_gib(memory.total)}: weights {_gib(memory.weights)}, gradients {_gib(memory.gradients)}, optimizer "
            f"{_gib(memory.states)}, activations {_gib(memory.activations)}",
        ),
        ("disk of a checkpoint", _gib(phase.checkpoint)),
    ]
    if memory.host:
        rows.append(("host memory for each GPU", _gib(memory.host)))
    write_line(f"phase {phase.name}")
    write_table([(f"  {name}", text) for name, text in rows])


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
