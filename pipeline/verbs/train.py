"""The second stage: `asvr train` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import plain, write_line
from pipeline.verbs.options import (
    HostFile,
    LauncherName,
    Nodes,
    Nproc,
    Overrides,
    RecipeFile,
    Rendezvous,
    launcher_of,
)

app = typer.Typer()


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    phase: Annotated[str | None, typer.Option(metavar="NAME", help="stop after this phase")] = None,
    launcher: LauncherName = "local",
    nproc: Nproc = None,
    nodes: Nodes = None,
    hostfile: HostFile = None,
    rendezvous: Rendezvous = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="make N steps, save, and end; the same command goes on")
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="MINUTES", help="save and end (exit code 12) after the step in which they are over"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the exact command, and stop")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="say all that is wrong or missing, and what the run takes, and stop")
    ] = False,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="for --check: the GPUs that the hours are for")] = "H100",
    gpus: Annotated[int, typer.Option(min=1, metavar="N", help="for --check: how many")] = 8,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="for --check: share of their peak that is used")] = 0.4,
) -> None:
    """Train the phases that are not finished.

    Goes on from the newest checkpoint. SIGTERM and Ctrl-C end the run after the step it is in, saved. Under torchrun,
    deepspeed or Slurm each process is one of their ranks.
    """
    from pipeline import launch
    from pipeline.recipe import load_recipe

    if check:
        from pipeline.train_check import check_run

        run = launch.until_phase(load_recipe(recipe, overrides or ()).train(), phase)
        check_run(run, gpu=gpu, gpus=gpus, mfu=mfu)
        return
    program = launcher_of(launcher, nproc, nodes, hostfile, rendezvous)
    config = load_recipe(recipe, overrides or ()).train()
    limits = launch.Limits(max_steps, time_limit)
    asvr = launch.arguments(recipe, overrides or (), phase, limits)
    raise typer.Exit(launch.train(config, phase=phase, launcher=program, asvr=asvr, limits=limits, dry_run=dry_run))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output folder of a training run")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="default: RUN/export")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="then publish it as that model on the Hugging Face Hub")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
) -> None:
    """Write a run as a plain Hugging Face folder."""
    from pipeline import launch

    exported = launch.export(run, out)
    write_line(plain(exported))
    if push_to_hub is not None:
        from pipeline.publish_model import push_model

        write_line(plain(f"published as {push_model(exported, push_to_hub, private=private)}"))
