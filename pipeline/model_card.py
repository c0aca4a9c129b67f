"""The README.md of an export: what the model is, what it was made from, and under which licences.

Everything in it comes from the run's own files: its configuration, its checkpoints' markers, the manifests, metrics and
evaluation. Places on this machine, environment and command lines are left out; of a file stands its name and its sha256.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.reader import open_manifest
from manifests.schema import Producer
from pipeline.console import plain

if TYPE_CHECKING:
    from train_stage.checkpoint import Checkpoint
    from train_stage.config import ResolvedPhase, TrainConfig

RESULTS = Path("eval", "results.json")
"""Where `asvr eval` leaves its results, below the run."""

LICENCES = {
    "lmsys/vicuna-7b-v1.5": "llama2",
    "lmsys/vicuna-13b-v1.5": "llama2",
    "mistralai/Mistral-7B-Instruct-v0.2": "apache-2.0",
    "Qwen/Qwen2.5-7B-Instruct": "apache-2.0",
    "google/siglip-so400m-patch14-384": "apache-2.0",
    "google/siglip2-so400m-patch14-384": "apache-2.0",
    "facebook/dinov2-large": "apache-2.0",
}
"""Of published models that recipes name, as their cards say; a model that is not here is said to be unknown."""

_UNKNOWN = "not known here: see where it came from"


def write_card(config: TrainConfig, phase: str, step: int) -> str:
    """The card of the model that the run of `config` had at `step` of `phase`."""
    from huggingface_hub import ModelCardData

    bases = [config.model.language_model, config.model.vision_tower]
    head = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license="other",
        license_name="see-the-licences-below",
        tags=["llava", "asvr"],
        base_model=[name for name in bases if is_hub_id(name)] or None,
    ).to_yaml()
    phases = [config.phase(own.name) for own in config.phases]
    phases = phases[: [own.name for own in phases].index(phase) + 1]
    sections = [
        f"---\n{head}\n---",
        "# A LLaVA trained with ASVR",
        f"A vision-language model of {_code(_name(config.model.language_model))} and "
        f"{_code(_name(config.model.vision_tower))}, at step {step:,} of phase {_code(phase)}. It was trained by "
        "[asvr](https://arxiv.org/abs/2506.09040)'s recipe: " + "; ".join(_objective(own) for own in phases) + ". "
        "Whatever predicted the targets is in `visual_head.safetensors`; answering needs nothing of it.",
        _USE,
        "## Training",
        _table(("phase", "objective", "trained", "template", "lr", "samples a step", "epochs"), map(_phase, phases)),
        "## Made from",
        _table(("what", "which", "fingerprint or sha256"), _inputs(config, phases)),
        "## Figures",
        _table(("of", "figure", "value"), _figures(config, phases)) or "None were measured.",
        "## Licences",
        "The model is bound by the licences of all that it was made from. Those of the training data are not known here.",
        _table(("what", "which", "licence"), _licences(config, phases)),
        "## Versions",
        _table(("package", "version"), sorted(_versions(config, phase).items())),
    ]
    return "\n\n".join(part for part in sections if part) + "\n"


_USE = """## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER_OR_REPO)
processor = AutoProcessor.from_pretrained(FOLDER_OR_REPO, backend="pil")  # the very pixels of training
```"""


def is_hub_id(location: str) -> bool:
    """Whether a model was named by its id on the Hub, not as a folder."""
    return location.count("/") == 1 and not location.startswith(("/", ".", "~"))


def _name(location: str) -> str:
    return location if is_hub_id(location) else Path(location).name


def _objective(phase: ResolvedPhase) -> str:
    said = " + ".join(f"{term.weight:g} x {term.name} ({term.kind})" for term in phase.terms)
    return f"{phase.name} with {said or 'the text loss alone'}"


def _phase(phase: ResolvedPhase) -> tuple[str, ...]:
    terms = ", ".join(f"{term.kind}" for term in phase.terms) or "none"
    epochs = f"{phase.epochs}" + (f", at most {phase.max_steps:,} steps" if phase.max_steps else "")
    parts = ", ".join(phase.trainable)
    return _code(phase.name), terms, parts, phase.template, f"{phase.lr:g}", f"{phase.batch_size:,}", epochs


def _inputs(config: TrainConfig, phases: Sequence[ResolvedPhase]) -> Iterator[tuple[str, ...]]:
    model = config.model
    settings = {phase.name: _settings(config, phase.name) for phase in phases}
    last = settings[phases[-1].name].get("model", {})
    for part, key in (
        ("language model", "language_model"),
        ("tokenizer", "tokenizer"),
        ("vision tower", "vision_tower"),
    ):
        location = getattr(model, key) or model.language_model
        digest = "" if is_hub_id(location) else str(last.get(key, ""))
        yield part, _code(_name(location)), _code(digest) if digest else ""
    for phase in phases:
        for data, sha256 in zip(phase.data, settings[phase.name].get("data", []), strict=False):
            yield f"records of {phase.name}", _code(Path(data.path).name), _code(sha256)
    for folder, producer, fingerprint in _sets(phases):
        yield "token set", _code(f"{folder} ({producer.kind})"), _code(fingerprint)


def _sets(phases: Sequence[ResolvedPhase]) -> Iterator[tuple[str, Producer, str]]:
    """Name, producer and fingerprint of each manifest, once."""
    places = dict.fromkeys(path for phase in phases for group in phase.all_manifests.values() for path in group)
    for place in places:
        manifest = open_manifest(place).manifest
        yield Path(place.partition("?")[0]).name, manifest.producer, manifest.fingerprint


def _licences(config: TrainConfig, phases: Sequence[ResolvedPhase]) -> Iterator[tuple[str, ...]]:
    for part, location in (
        ("language model", config.model.language_model),
        ("tokenizer", config.model.tokenizer or config.model.language_model),
        ("vision tower", config.model.vision_tower),
    ):
        yield part, _code(_name(location)), _code(licence_of(location))
    for kind, origin in dict.fromkeys((own.kind, own.origin) for _, own, _ in _sets(phases)):
        yield "visual tokenizer", _code(f"{kind}: {_origin(origin)}"), _code(licence_of_tokenizer(kind))


def _origin(origin: str) -> str:
    return Path(origin).name if origin.startswith("/") else origin.partition("?")[0]


def licence_of(location: str) -> str:
    """What the model's own card says in its folder, else what is known of the published model."""
    from huggingface_hub import ModelCard

    card = Path(location) / "README.md"
    if card.is_file():
        try:
            said = ModelCard.load(card).data.get("license")
        except (ValueError, OSError):  # somebody else's file
            said = None
        if isinstance(said, str) and said:
            return said
    return LICENCES.get(location, _UNKNOWN)


def licence_of_tokenizer(kind: str) -> str:
    """What `asvr tokenizers` says of the published models of a kind."""
    from tokenize_stage.families import PUBLISHED

    return "; ".join(dict.fromkeys(row.licence for row in PUBLISHED if row.kind == kind)) or _UNKNOWN


def _figures(config: TrainConfig, phases: Sequence[ResolvedPhase]) -> Iterator[tuple[str, str, str]]:
    from train_stage.metrics import last_records

    for phase in phases:
        for kind, record in last_records(config.phase_folder(phase.name)).items():
            for name, value in _flat(record):
                yield f"{phase.name}, {kind} at step {record['step']}", name, value
    path = Path(config.output) / RESULTS
    if path.is_file():
        for name, value in _flat(json.loads(path.read_bytes())):
            yield "asvr eval", name, value


def _flat(record: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """The losses and accuracies of a record, by dotted name."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        elif any(word in name for word in ("loss", "accuracy")):
            values = value if isinstance(value, list) else [value]
            if values and all(isinstance(own, float) for own in values):
                yield f"{before}{name}", ", ".join(f"{own:.4g}" for own in values)


def _settings(config: TrainConfig, phase: str) -> dict[str, Any]:
    newest = _newest(config, phase)
    return newest.settings if newest else {}


def _versions(config: TrainConfig, phase: str) -> dict[str, str]:
    from train_stage.checkpoint import MARKER

    newest = _newest(config, phase)
    marker = json.loads((newest.path / MARKER).read_bytes()) if newest else {}
    return {str(name): str(version) for name, version in marker.get("versions", {}).items()}


def _newest(config: TrainConfig, phase: str) -> Checkpoint | None:
    from train_stage.checkpoint import newest

    return newest(config.phase_folder(phase))


def _table(header: Sequence[str], rows: Any) -> str:
    """A Markdown table; empty without rows."""
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    if not lines:
        return ""
    rule = " | ".join("---" for _ in header)
    return "\n".join(f"| {line} |" for line in (" | ".join(header), rule, *lines))


def _code(text: str) -> str:
    """Text from outside as Markdown that does nothing."""
    return f"`{plain(text, 200).replace('`', chr(39))}`"
