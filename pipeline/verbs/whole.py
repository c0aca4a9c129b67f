"""The whole recipe: `asvr plan` says how each step stands and why, `asvr run` does what is to be done."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.verbs.options import (
    AsJson,
    HostFile,
    LauncherName,
    Nodes,
    Nproc,
    Overrides,
    RecipeFile,
    Rendezvous,
    Submit,
    launcher_of,
)

app = typer.Typer()


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what of a recipe is up to date, and why not.

    A step is fresh, stale, missing, interrupted, running or blocked. Reads the outputs themselves, writes nothing, and
    starts neither Ray nor torch.
    """
    from pipeline.run_recipe import show_plan

    show_plan(recipe, overrides or (), as_json=as_json)


@app.command("run")
def run_(
    recipe: RecipeFile,
    overrides: Overrides = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="allow what was made with other settings to be replaced")
    ] = False,
    submit: Submit = None,
    launcher: LauncherName = "local",
    nproc: Nproc = None,
    nodes: Nodes = None,
    hostfile: HostFile = None,
    rendezvous: Rendezvous = None,
) -> None:
    """Do what is not fresh, in order, and nothing else.

    Where something would have to be replaced, nothing is begun without --replace. Phases that are replaced are moved to
    RUN/_replaced, not deleted.
    """
    from pipeline.run_recipe import run_recipe

    program = launcher_of(launcher, nproc, nodes, hostfile, rendezvous)
    raise typer.Exit(run_recipe(recipe, overrides or (), replace=replace, launcher=program, submit_to=submit))
