"""What a training run wrote down of itself: its phases' metrics, the token sets it learned from, and its answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.atomic import storage_errors
from manifests.errors import InputError, VerificationFailed

MARKER, LAUNCHED = "COMPLETE.json", "config.json"
METRICS = "metrics.jsonl"
ANSWERS, RESULTS = Path("eval", "answers.jsonl"), Path("eval", "results.json")
VALIDATION = "validation"


@dataclass(frozen=True)
class Answer:
    """What the model of a run said to a question."""

    image: str
    question: str
    expected: str
    answer: str
    correct: bool


@dataclass(frozen=True)
class Phase:
    """The steps of a phase, and its validation records, as their JSON lines say."""

    name: str
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    finished: bool


@dataclass(frozen=True)
class Run:
    """A run folder. `token_sets` are the manifests of its phases, `held_out` the losses that `asvr eval` measured."""

    name: str
    folder: Path
    phases: list[Phase]
    token_sets: list[str]
    answers: list[Answer]
    held_out: dict[str, float]


def is_run(folder: Path) -> bool:
    """Whether a folder is the output of `asvr train`."""
    return any(folder.glob(f"*/{METRICS}"))


def read_run(folder: Path) -> Run:
    """Read a run; `InputError` where none is, `VerificationFailed` for a line that is no record."""
    if not is_run(folder):
        raise InputError(f"{folder} is no training run, since no phase in it has a {METRICS}: give the output of a run")
    with storage_errors("read", folder):
        files = sorted(folder.glob(f"*/{METRICS}"), key=lambda path: (_began(path), path.parent.name))
        phases = [_phase(path) for path in files]
        answers = [_answer(record, folder) for record in _records(folder / ANSWERS)]
    return Run(folder.resolve().name, folder, phases, _token_sets(folder, files), answers, _held_out(folder))


def _phase(path: Path) -> Phase:
    steps: list[dict[str, Any]] = []
    validations: list[dict[str, Any]] = []
    for record in _records(path):
        kind = record.get("kind")  # those of steps have none
        if kind in (None, VALIDATION):
            (steps if kind is None else validations).append(record)
    marker = _marker(path.parent)
    return Phase(path.parent.name, steps, validations, bool(marker and marker.get("final")))


def _began(path: Path) -> str:
    """The time of the first step, by which phases are ordered."""
    return next((str(record.get("time", "")) for record in _records(path)), "")


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a JSONL file; a line that a killed process left unfinished does not count."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise VerificationFailed(f"line {number} of {path} is no record: remove the line, or the file")
            yield record


def _marker(phase: Path) -> dict[str, Any] | None:
    """What the newest checkpoint of a phase says; None where there is none."""
    steps = {}
    for path in phase.glob(f"step_*/{MARKER}"):
        number = path.parent.name.removeprefix("step_")
        if number.isdigit():
            steps[int(number)] = path
    if not steps:
        return None
    return _document(steps[max(steps)], "remove its folder, and the run goes on from before it")


def _document(path: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise VerificationFailed(f"{path} is damaged: {remedy}")
    return value


def _token_sets(folder: Path, metrics: list[Path]) -> list[str]:
    """The manifests that the phases' settings name, each once: those of the launch, and those that checkpoints kept."""
    configs = [_at(_marker(path.parent), "config", default={}) for path in metrics]
    launched = folder / LAUNCHED
    if launched.is_file():
        configs.insert(0, _document(launched, "start the run again, which writes it anew"))
    found = [name for config in configs for phase in _at(config, "phases", default=[]) for name in _manifests(phase)]
    return list(dict.fromkeys(found))


def _manifests(value: Any) -> list[str]:
    """Every entry of every key `manifests` in a phase: its own and those of its objectives."""
    if isinstance(value, list):
        return [name for item in value for name in _manifests(item)]
    if not isinstance(value, dict):
        return []
    own = [str(name) for name in value.get("manifests") or []]
    return own + [name for key, item in value.items() if key != "manifests" for name in _manifests(item)]


def _at(value: Any, *keys: str, default: Any) -> Any:
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def _held_out(folder: Path) -> dict[str, float]:
    """Losses and accuracies by name; empty where `asvr eval` has measured none."""
    path = folder / RESULTS
    if not path.is_file():
        return {}
    losses = _at(_document(path, "run asvr eval again"), "losses", default={})
    found = {"loss": _at(losses, "loss", default=None), "text loss": _at(losses, "text_loss", default=None)}
    for name, term in dict(_at(losses, "objectives", default={})).items():
        found[f"{name}: loss"] = _at(term, "loss", default=None)
        for depth, value in enumerate(_at(term, "accuracy_depth", default=[])):
            found[f"{name}: code accuracy, depth {depth}"] = value
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}


def _answer(record: dict[str, Any], folder: Path) -> Answer:
    try:
        image, question, expected, answer = (str(record[key]) for key in ("image", "question", "expected", "answer"))
        return Answer(image, question, expected, answer, bool(record["correct"]))
    except KeyError as error:
        raise VerificationFailed(f"an answer in {folder / ANSWERS} has no {error}: run asvr eval again") from error
