"""Checkpoints: `RUN/PHASE/step_N`, complete or not there at all. Torch-free, so that a finished run is seen at once.

All ranks write into `step_N.tmp`; then rank 0 adds the trained weights and `COMPLETE.json`, and renames the folder.
A kill at any moment leaves the checkpoints before it as they were. What decides the numbers of a run is recorded in
`COMPLETE.json` and compared on resume: data, manifests, weights and settings by content, places by nothing.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from manifests.atomic import flush, storage_errors, write_atomically
from manifests.errors import InputError, TrainingStopped
from manifests.fingerprint import differing_keys, digest
from manifests.hashes import file_sha256
from manifests.reader import open_manifest
from manifests.redact import redact
from train_stage.config import ResolvedPhase, TrainConfig
from train_stage.deepspeed_settings import that_decide

log = logging.getLogger(__name__)

MARKER = "COMPLETE.json"
WEIGHTS = "weights.safetensors"
"""Everything trained so far, in this phase and those before it, named as `AsvrModel.named_parameters()` names it."""

VERSIONED = ("asvr", "deepspeed", "numpy", "torch", "transformers")
"""Packages whose versions a checkpoint records."""

UNFINISHED = ".tmp"
_STEP = re.compile(r"^step_(\d+)$")
_MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")
_FREE = {
    "name",
    "data",
    "manifests",
    "vision_features",
    "input_codes",
    "micro_batch_tokens",
    "max_bad_rate",
    "validation",
}
"""Fields of a phase that may differ on resume: places, which are compared by content, and what changes no number."""

_COMPARED_BY_CONTENT = {
    "data": "data: other records",
    "manifests": "manifests: other codes or features",
    "after": "after: the phase before it had other settings",
}
"""How settings that stand there as hashes are said to differ."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and what its marker says."""

    path: Path
    step: int
    final: bool
    world: int
    settings: dict[str, Any]
    versions: dict[str, str]
    samples: dict[str, Any] | None = None
    """How many samples the phase has and their digest, see `Samples.identity`; None in checkpoints of earlier versions."""

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS


def newest(folder: Path) -> Checkpoint | None:
    """The complete checkpoint of a phase with the highest step."""
    found = complete(folder)
    return found[-1] if found else None


def complete(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a phase, by step."""
    with storage_errors("read", folder):
        paths = [path for path in folder.iterdir() if _STEP.match(path.name)] if folder.is_dir() else []
    read = [_read(path) for path in paths if (path / MARKER).is_file()]
    return sorted(read, key=lambda checkpoint: checkpoint.step)


def _read(path: Path) -> Checkpoint:
    try:
        marker = json.loads((path / MARKER).read_bytes())
        samples = marker.get("samples")
        return Checkpoint(
            path=path,
            step=marker["step"],
            final=marker["final"],
            world=marker["world_size"],
            settings=marker["settings"],
            versions=marker["versions"],
            samples=samples and {key: samples[key] for key in ("count", "digest")},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingStopped(
            f"{path / MARKER} is damaged: remove {path}, and the run goes on from before it"
        ) from error


def content_digest(path: str) -> str:
    """What stands for the content of a manifest; unlike the manifest's own digest it leaves out who made it and when."""
    opened = open_manifest(path)
    return digest([opened.manifest.fingerprint, opened.manifest.index.sha256, [s.sha256 for s in opened.shards]])


def settings_of(config: TrainConfig, phase_name: str, content: Callable[[str], str] = content_digest) -> dict[str, Any]:
    """What decides the numbers of a phase: its settings, the content of its inputs, and the phase before it.

    `content` stands for that of a manifest, for one who asks before the manifest is there.
    """
    names = [phase.name for phase in config.phases]
    phase = config.phase(phase_name)
    position = names.index(phase_name)
    return {
        "seed": config.seed,
        "precision": config.precision,
        "deepspeed": that_decide(config.deepspeed),
        "model": _model_settings(config),
        "phase": _without_places(phase.model_dump(mode="json", exclude=_FREE)),
        "data": [_file_digest(data.path) for data in phase.data],
        **_ratios(phase),
        "manifests": {name: [content(path) for path in group] for name, group in phase.all_manifests.items()},
        "after": digest(settings_of(config, names[position - 1], content)) if position else _start_digest(config),
    }


def start_of(config: TrainConfig) -> Checkpoint:
    """The end of the phase that `init_from` names; InputError unless it is there and was trained on the same model."""
    folder = Path(str(config.init_from))
    last = newest(folder)
    if last is None or not last.final:
        raise InputError(
            f"init_from is {folder}, where no phase has come to its end: give RUN/PHASE of a run that is finished"
        )
    differing = differing_keys({"model": last.settings["model"]}, {"model": _model_settings(config)})
    if differing:
        raise InputError(
            f"init_from is {folder}, which was trained on another model ({'; '.join(differing[:4])}): give this run its model"
        )
    return last


def _start_digest(config: TrainConfig) -> str | None:
    if config.init_from is None:
        return None
    start = start_of(config)
    return digest([start.settings, start.step])


def _model_settings(config: TrainConfig) -> dict[str, Any]:
    model = config.model.model_dump(mode="json", exclude={"llava"} if config.model.llava is None else None)
    model["tokenizer"] = config.model.tokenizer or config.model.language_model
    parts = [part for part in ("language_model", "tokenizer", "vision_tower", "llava") if part in model]
    return {**model, **{part: _content(model[part]) for part in parts}}


def _ratios(phase: ResolvedPhase) -> dict[str, list[float]]:
    """How often an epoch goes through each data file, where that is not once."""
    ratios = [data.ratio for data in phase.data]
    return {"ratios": ratios} if set(ratios) != {1.0} else {}


def _file_digest(path: str) -> str:
    if not Path(path).is_file():
        raise InputError(f"the data file {path} does not exist: check data.path")
    return file_sha256(Path(path))


def _without_places(phase: dict[str, Any]) -> dict[str, Any]:
    """The settings of a phase without the places of its terms' manifests, which are compared by content."""
    objective = phase["objective"]
    for term in objective if isinstance(objective, list) else [objective]:
        term.pop("manifests", None)
    return phase


def _content(location: str) -> str:
    """What stands for a model folder: the hashes of its files; a hub id stands for itself."""
    folder = Path(location)
    if not folder.is_dir():
        return location
    files = sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES and path.is_file())
    return digest([[path.name, file_sha256(path)] for path in files])


def is_finished(config: TrainConfig) -> bool:
    """Whether every phase has its last checkpoint, made with these settings."""
    last = [newest(config.phase_folder(phase.name)) for phase in config.phases]
    if not all(checkpoint is not None and checkpoint.final for checkpoint in last):
        return False
    wanted = [settings_of(config, phase.name) for phase in config.phases]
    return all(
        checkpoint is not None and checkpoint.settings == settings
        for checkpoint, settings in zip(last, wanted, strict=True)
    )


def check_fits(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """Raise TrainingStopped unless going on from `checkpoint` gives what an uninterrupted run would have given."""
    differing = differing_keys(checkpoint.settings, settings)
    if differing:
        said = dict.fromkeys(_COMPARED_BY_CONTENT.get(re.split(r"[.\[:]", text)[0], text) for text in differing)
        raise TrainingStopped(
            f"{checkpoint.path} was made with other settings ({'; '.join(list(said)[:6])}): restore them, choose another "
            "output, or train anew with asvr run RECIPE --replace, which moves what is there aside"
        )


def check_model(config: TrainConfig, settings: dict[str, Any]) -> None:
    """Raise TrainingStopped if the model's folders no longer hold what they did when `settings` were made."""
    differing = differing_keys({"model": settings["model"]}, {"model": _model_settings(config)})
    if differing:
        raise TrainingStopped(
            f"the model is another than when the run was started ({'; '.join(differing[:4])}): restore it, or choose "
            "another output"
        )


def check_samples(checkpoint: Checkpoint, samples: dict[str, Any]) -> None:
    """Raise TrainingStopped unless `checkpoint` was trained on these samples: others would stand in another order.

    The settings do not tell: they hold the records, and not the pictures for which some of those are left out.
    """
    before = checkpoint.samples
    if before is not None and before != samples:
        raise TrainingStopped(
            f"{checkpoint.path} was made with {before['count']} samples, and those that can be used now ({samples['count']}) "
            "are others: bring pictures that are missing or changed back, and take away those that were missing then (what "
            "is left out stands above); or choose another output"
        )


def name_other_versions(checkpoint: Checkpoint) -> None:
    """Warn where other packages go on with `checkpoint`. No error: whoever updates cannot always go back."""
    differing = differing_keys(checkpoint.versions, _versions(VERSIONED))
    if differing:
        log.warning(
            "%s was made with other packages (%s): numbers may differ from those of a run that was not interrupted",
            checkpoint.path,
            "; ".join(differing),
        )


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run left behind: unfinished checkpoints, and half-removed old ones."""
    with storage_errors("remove", folder):
        for path in folder.glob(f"step_*{UNFINISHED}"):
            shutil.rmtree(path)


def unfinished_name(step: int) -> str:
    """The folder that a checkpoint is written to."""
    return f"step_{step}{UNFINISHED}"


def commit(
    folder: Path,
    step: int,
    *,
    final: bool,
    world: int,
    settings: dict[str, Any],
    config: TrainConfig,
    keep_last: int,
    samples: dict[str, Any] | None = None,
) -> Path:
    """Make the unfinished checkpoint of `step` complete, and remove all but the newest `keep_last`. Rank 0 only.

    The marker and the files beside it are on disk before the name says so.
    """
    unfinished, path = folder / unfinished_name(step), folder / f"step_{step}"
    marker = {
        "step": step,
        "final": final,
        "world_size": world,
        "settings": settings,
        "samples": samples,
        "config": redact(config.model_dump(mode="json")),
        "versions": _versions(VERSIONED),
    }
    with storage_errors("write", unfinished):
        for written in unfinished.rglob("*"):
            flush(written)
        write_atomically(unfinished / MARKER, json.dumps(marker, indent=1).encode())
        if path.exists():  # without a marker, or the run would have gone on from it
            shutil.rmtree(path)
        unfinished.rename(path)
        flush(folder)
    with storage_errors("remove", folder):
        for old in complete(folder)[:-keep_last]:
            # First the name, so that a kill in between leaves nothing that looks complete.
            doomed = old.path.with_name(old.path.name + UNFINISHED)
            old.path.rename(doomed)
            shutil.rmtree(doomed)
    log.info("checkpoint %s", path)
    return path


def finish(checkpoint: Checkpoint) -> None:
    """Say of a checkpoint of a phase's last step that the phase is done, which it was not when it was written."""
    path = checkpoint.path / MARKER
    with storage_errors("write", path):
        marker = json.loads(path.read_bytes())
        write_atomically(path, json.dumps({**marker, "final": True}, indent=1).encode())


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
