"""What of a recipe is fresh, stale, missing or interrupted, and why: read from the outputs themselves, nothing else.

Every output says what it was made from (fingerprint, commit records, `codebook.json`, `COMPLETE.json`, the export's
marker, the results of an evaluation), so there is no record of runs that could be lost or disagree with the folders. Torch and Ray are not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pipeline.state_tokenize import codebook_step, token_set_step
from pipeline.state_train import eval_step, export_step, phase_step
from pipeline.steps import Changing, Kind, Step, changing

if TYPE_CHECKING:
    from pipeline.recipe import Recipe


class Look(NamedTuple):
    """One step of a recipe, to be looked at when those before it have been looked at, or done."""

    kind: Kind
    name: str
    now: Callable[[Changing], Step]


def looks_of(recipe: Recipe) -> list[Look]:
    """The steps of a recipe in the order in which they run. Raises RecipeError."""
    codebooks = recipe.codebooks() if recipe.has("codebooks") else {}
    sets = recipe.token_sets() if recipe.has("tokenize") else {}
    looks = [Look("codebook", name, partial(codebook_step, name, config)) for name, config in codebooks.items()]
    looks += [Look("token set", name, partial(token_set_step, name, config)) for name, config in sets.items()]
    if recipe.has("train"):
        train = recipe.train()
        looks += [Look("phase", phase.name, partial(phase_step, train, phase.name)) for phase in train.phases]
        looks.append(Look("export", "export", partial(export_step, train)))
        if train.eval is not None:
            looks.append(Look("eval", "eval", partial(eval_step, train)))
    return looks


def plan(recipe: Recipe) -> list[Step]:
    """How every step of a recipe stands, each judged by what the steps before it will have made. Raises RecipeError."""
    steps: list[Step] = []
    for look in looks_of(recipe):
        steps.append(look.now(changing(steps)))
    return steps
