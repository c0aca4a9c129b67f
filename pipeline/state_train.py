"""How the phases of a training run and its export stand, read from their folders. Imports no torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import AsvrError, InputError
from manifests.fingerprint import differing_keys
from manifests.storage import Store
from pipeline.evaluated import FOLDER, RESULTS, held_out_of, made_from_run, read_made_from
from pipeline.steps import Changing, State, Step, in_words

if TYPE_CHECKING:
    from train_stage.checkpoint import Checkpoint
    from train_stage.config import TrainConfig

EXPORT = "export"
"""The folder of a run's export below its output."""

_WORDS = {
    "ratios": "ratios of the files of records changed:",
    "phase.lr": "learning rate changed:",
    "phase.batch_size": "batch size changed:",
    "phase.objective": "objective changed",
    "phase.objective.kind": "objective changed:",
    "phase.objective.shift": "shift of the objective changed:",
    "phase.lora": "LoRA changed:",
    "phase.trainable": "trainable parts changed:",
    "phase.geometry": "geometry changed",
    "phase.template": "chat template changed:",
    "model.language_model": "language model changed",
    "model.tokenizer": "language model's tokenizer changed",
    "model.vision_tower": "vision tower changed",
    "model.llava": "published LLaVA changed",
    "model.vision_feature_layer": "vision feature layer changed:",
    "deepspeed": "DeepSpeed settings changed",
    "seed": "seed changed:",
    "precision": "precision changed:",
}

_EVAL_WORDS = {
    "checkpoint": "it measured another checkpoint",
    "records": "held-out records changed",
    "manifests": "held-out token sets changed",
    "limit": "number of questions changed",
}
"""What is said of an evaluation that was made from something else."""


def phase_step(config: TrainConfig, name: str, before: Changing) -> Step:
    """How one phase stands: its newest checkpoint, and whether that was made with what the recipe says now."""
    from train_stage.checkpoint import newest

    folder = config.phase_folder(name)

    def step(state: State, *reasons: str, replaces: bool = False, error: AsvrError | None = None) -> Step:
        return Step("phase", name, str(folder), state, reasons, replaces, error)

    try:
        if owner := Store.open(config.output).lease_owner():
            return step("running", f"trained by {owner}")
        checkpoint = newest(folder)
        reasons = _changes(config, name, before, checkpoint)
    except AsvrError as error:
        return step("blocked", str(error), error=error)
    if checkpoint is None:
        begun = folder.is_dir() and any(folder.iterdir())
        return step("interrupted", "before its first checkpoint: it begins again") if begun else step("missing")
    if reasons:
        return step("stale", *reasons, replaces=True)
    if not checkpoint.final:
        return step("interrupted", f"goes on from step {checkpoint.step:,}")
    return step("fresh", f"step {checkpoint.step:,}")


def _changes(config: TrainConfig, name: str, before: Changing, checkpoint: Checkpoint | None) -> tuple[str, ...]:
    """What a phase would be given now that its checkpoint was not made with, in words.

    Raises what reading its inputs raises, also where there is no checkpoint yet.
    """
    from train_stage.checkpoint import settings_of

    wanted = settings_of(config, name, _content_after(before))
    if checkpoint is None:
        return ()
    recorded = checkpoint.settings
    differing = differing_keys(recorded, wanted)
    said = list(in_words([one for one in differing if _group(one) not in ("data", "manifests", "after")], _WORDS))
    groups = {_group(one) for one in differing}
    if "data" in groups:
        said += _changed_data(config, name, recorded, wanted)
    if "manifests" in groups:
        said += _changed_manifests(config, name, before, recorded, wanted)
    if "after" in groups:
        names = [phase.name for phase in config.phases]
        at = names.index(name)
        verb = "will change" if at and str(config.phase_folder(names[at - 1])) in before else "changed"
        said.append(f"phase {names[at - 1]} {verb}" if at else "it starts from other weights")
    return tuple(said)


def _content_after(before: Changing) -> Callable[[str], str]:
    """The content of a manifest as it will be: of one that is about to change nothing is known yet. Each is opened once."""
    from train_stage.checkpoint import content_digest

    return functools.cache(lambda path: "to be made" if path in before else content_digest(path))


def _group(difference: str) -> str:
    return re.split(r"[.\[:]", difference)[0]


def _changed_data(config: TrainConfig, name: str, recorded: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    was, now = recorded["data"], wanted["data"]
    if len(was) != len(now):
        return [f"{len(was)} files of records before, {len(now)} now"]
    files = config.phase(name).data
    changed = [Path(file.path).name for file, old, new in zip(files, was, now, strict=True) if old != new]
    return [f"records changed: {', '.join(changed)}"]


def _changed_manifests(
    config: TrainConfig, name: str, before: Changing, recorded: dict[str, Any], wanted: dict[str, Any]
) -> list[str]:
    was, now = recorded["manifests"], wanted["manifests"]
    said: dict[str, None] = {}
    for group, paths in config.phase(name).all_manifests.items():
        for at, path in enumerate(paths):
            if was.get(group, [])[at : at + 1] != now[group][at : at + 1]:
                said[f"its {before[path]} will change" if path in before else f"codes of {path} changed"] = None
    return list(said) or ["other token sets"]


def export_step(config: TrainConfig, before: Changing) -> Step:
    """How the export of a run stands. It is a copy, so that making it anew takes nothing away."""
    from train_stage.checkpoint import newest
    from train_stage.export_marker import MARKER_FILE, origin_of, read_origin

    folder, last = Path(config.output) / EXPORT, config.phases[-1].name

    def step(state: State, *reasons: str, error: AsvrError | None = None) -> Step:
        return Step("export", EXPORT, str(folder), state, reasons, error=error)

    there = (folder / MARKER_FILE).is_file()
    if not there and folder.is_dir() and any(folder.iterdir()):
        error = InputError(f"{folder} holds something else than an export of ours: move it away")
        return step("blocked", str(error), error=error)
    upstream = before.get(str(config.phase_folder(last)))
    if upstream or not there:
        return step("stale", f"{upstream} will change") if there else step("missing")
    try:
        checkpoint = newest(config.phase_folder(last))
    except AsvrError as error:
        return step("blocked", str(error), error=error)
    origin = read_origin(folder)
    if checkpoint is None or origin is None:
        return step("stale", "nothing says which checkpoint it was made from")
    if origin != origin_of(checkpoint, last):
        return step("stale", f"made from phase {origin.get('phase')}, step {origin.get('step')}")
    return step("fresh", f"phase {last}, step {checkpoint.step:,}")


def eval_step(config: TrainConfig, before: Changing) -> Step:
    """How the evaluation of a run stands. It can be measured again, so that doing so takes nothing away."""
    from train_stage.checkpoint import newest
    from train_stage.export_marker import origin_of

    folder, last = Path(config.output) / FOLDER, config.phases[-1].name

    def step(state: State, *reasons: str, error: AsvrError | None = None) -> Step:
        return Step("eval", "eval", str(folder), state, reasons, error=error)

    upstream = before.get(str(config.phase_folder(last)))
    there = (folder / RESULTS).is_file()
    try:
        checkpoint = None if upstream else newest(config.phase_folder(last))
        origin = origin_of(checkpoint, last) if checkpoint else None
        limit = config.eval.limit if config.eval else None
        wanted = made_from_run(config, last, origin, held_out_of(config, last), limit, _content_after(before))
    except AsvrError as error:
        return step("blocked", str(error), error=error)
    if not there:
        return step("missing")
    if upstream:
        return step("stale", f"{upstream} will change")
    found = read_made_from(folder)
    if found is None:
        return step("stale", "nothing says what it was made from")
    if found.get("model") != wanted["model"]:
        return step("stale", "it measured the export, which gives no losses")
    reasons = [words for key, words in _EVAL_WORDS.items() if found.get(key) != wanted[key]]
    return step("stale", *reasons) if reasons else step("fresh", f"phase {last}")
