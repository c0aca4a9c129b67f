"""`asvr plan` and `asvr run`: show how the steps of a recipe stand; do those that are not fresh, in order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from manifests.errors import FingerprintMismatch, LeaseHeld
from pipeline.console import plain, write_json, write_line, write_table
from pipeline.launchers import Launcher
from pipeline.recipe import Recipe, load_recipe
from pipeline.replaced import move_aside
from pipeline.state import looks_of, plan
from pipeline.steps import Step

log = logging.getLogger(__name__)


def show_plan(file: Path, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print the steps of a recipe and how they stand. Raises RecipeError."""
    steps = plan(load_recipe(file, overrides))
    if as_json:
        write_json({"recipe": str(file.absolute()), "steps": [step.as_dict() for step in steps]})
        return
    write_table([(step.title, step.state, step.why) for step in steps], ("step", "state", "why"))
    write_line()
    write_line(_advice(file, steps))


def _advice(file: Path, steps: Sequence[Step]) -> str:
    if blocked := [step.title for step in steps if step.state == "blocked"]:
        return plain(f"to be settled first: {', '.join(blocked)}")
    if replaced := [step.title for step in steps if step.replaces]:
        return plain(f"asvr run {file} --replace brings it up to date; it replaces {', '.join(replaced)}")
    if any(step.state != "fresh" for step in steps):
        return plain(f"asvr run {file} brings it up to date")
    return "everything is fresh: nothing to do"


def run_recipe(
    file: Path, overrides: Sequence[str], *, replace: bool, launcher: Launcher, submit_to: str | None
) -> int:
    """Do the steps of a recipe that are not fresh, in order; the exit code, which of a failed training is its rank's.

    Before the first one is begun, every reason not to begin is found: RecipeError, the error of a step that is blocked,
    LeaseHeld where another process is at work, FingerprintMismatch where something would be replaced without `replace`.
    After that, what the verbs of the steps raise.
    """
    recipe = load_recipe(file, overrides)
    steps = plan(recipe)
    _refuse(steps, replace)
    todo = [step for step in steps if step.state != "fresh"]
    if not todo:
        write_line("everything is fresh: nothing to do")
        return 0
    for look in looks_of(recipe):
        step = look.now({})  # once more: what came before may have left it as it was
        if step.state == "fresh":
            continue
        _refuse([step], replace)
        log.info("%s: %s%s", step.title, step.state, f" ({step.why})" if step.why else "")
        if code := _do(recipe, step, overrides, replace, launcher, submit_to):
            return code
    write_line("everything is fresh")
    return 0


def _refuse(steps: Sequence[Step], replace: bool) -> None:
    for step in steps:
        if step.error is not None:
            raise step.error
        if step.state == "running":
            raise LeaseHeld(
                f"{step.title} in {step.output} is being made already ({step.why}): wait for it, or stop it"
            )
    replaced = [f"{step.title} ({step.why})" for step in steps if step.replaces]
    if replaced and not replace:
        raise FingerprintMismatch(
            f"this would replace {', '.join(replaced)}: nothing was begun; restore the settings, choose other outputs, or "
            "add --replace"
        )


def _do(
    recipe: Recipe, step: Step, overrides: Sequence[str], replace: bool, launcher: Launcher, submit_to: str | None
) -> int:
    """Do one step by the very function that its verb calls; the exit code."""
    from pipeline import launch, submit, token_sets

    if step.kind == "codebook":
        token_sets.fit_codebooks(recipe.file, [step.name], overrides)
    elif step.kind == "token set":
        choice = token_sets.Choice(recipe.file, [step.name], overrides, replace=replace)
        if submit_to:
            submit.tokenize(choice, submit_to)
        else:
            token_sets.tokenize_sets(choice)
    elif step.kind == "phase":
        config = recipe.train()
        phases = [one for one in plan(recipe) if one.kind == "phase"]
        move_aside(Path(config.output), [one.name for one in phases if one.replaces])
        return launch.train(config, launcher=launcher, asvr=launch.arguments(recipe.file, overrides))
    elif step.kind == "eval":
        from pipeline.evaluation import Asked, evaluate

        config = recipe.train()
        found = evaluate(Path(config.output), Asked(), config=config)
        write_line(plain(f"eval: {found['questions']:,} questions, loss {found['losses']['loss']:.4f}: {step.output}"))
    else:
        config = recipe.train()
        write_line(plain(f"export: {launch.export(Path(config.output), config=config)}"))
    return 0
