"""The files of a frozen Hugging Face vision encoder: where they are, their hashes, how pixels are normalised. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import InputError
from manifests.hashes import file_sha256
from tokenize_stage.hub import locate_folder, parse_reference
from tokenize_stage.json_config import is_number

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Image processor settings; transformers 5 writes the second for a whole processor, with the image part inside."""

_HUB_FILES = [CONFIG, *PREPROCESSORS, "model*.safetensors", WEIGHTS_INDEX]


@dataclass(frozen=True)
class EncoderFiles:
    """A folder with an encoder; `revision` is the commit it is pinned to if it came from the hub."""

    folder: Path
    revision: str | None


@dataclass(frozen=True)
class Normalisation:
    """An encoder's input is `(pixel / 255 - mean) / std` per RGB channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def locate_encoder(path: str, revision: str | None = None) -> EncoderFiles:
    """A local folder, or the cached (else downloaded) snapshot of a hub id. `InputError` if it is neither."""
    folder = Path(path)
    if folder.is_dir():
        return EncoderFiles(folder, None)
    hub = parse_reference(path)
    if hub is None or hub.file:
        raise InputError(f"there is no encoder folder {path}: give a folder or a hub id such as owner/name")
    at = revision or hub.revision
    found = locate_folder(f"hf://{hub.model}@{at}" if at else hub.model, _HUB_FILES)
    return EncoderFiles(found.path, found.revision)


def encoder_sha256(folder: Path) -> dict[str, str]:
    """sha256 of every file that decides a feature, by name: configuration, normalisation and weights."""
    names = [CONFIG, _preprocessor(folder).name, *weight_files(folder)]
    if not (folder / CONFIG).is_file():
        raise InputError(f"the encoder folder {folder} has no {CONFIG}: it is not a Hugging Face model folder")
    return {name: file_sha256(folder / name) for name in names}


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files (and of their index); pickled weights are not read."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        raise InputError(
            f"the encoder folder {folder} has no {WEIGHTS}: save the model again in the safetensors format"
        )
    weight_map = _read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise InputError(f"{index} has no weight_map of plain file names: download the encoder again")
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise InputError(f"the encoder folder {folder} lacks {', '.join(missing)}: download the encoder again")
    return [WEIGHTS_INDEX, *sorted(names)]


def normalisation(folder: Path) -> Normalisation:
    """`read_normalisation` of the preprocessor's file in a model folder."""
    return read_normalisation(_preprocessor(folder))


def read_normalisation(file: Path) -> Normalisation:
    """Mean and standard deviation from a preprocessor's file, with its rescaling (usually 1/255) folded in."""
    settings = _read_json(file)
    settings = settings.get("image_processor", settings)
    if not isinstance(settings, dict):
        raise InputError(f"{file} holds no image processor settings: restore it from the encoder's origin")
    # A processor's input is pixel * factor; ours is pixel / 255, so its mean and std are in units of 255 * factor.
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1
    if not is_number(factor) or factor <= 0:
        raise InputError(f"{file} has no usable rescale_factor: restore it from the encoder's origin")
    unit = 1.0 if math.isclose(factor * 255, 1, rel_tol=1e-9) else factor * 255
    normalises = settings.get("do_normalize", True)
    mean = _channels(file, settings, "image_mean") if normalises else (0.0, 0.0, 0.0)
    std = _channels(file, settings, "image_std") if normalises else (1.0, 1.0, 1.0)
    if min(std) <= 0:
        raise InputError(f"{file} has an image_std that is not positive: restore it from the encoder's origin")
    return Normalisation(_scaled(mean, unit), _scaled(std, unit))


def _preprocessor(folder: Path) -> Path:
    for name in PREPROCESSORS:
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"the encoder folder {folder} has no {PREPROCESSORS[0]}: add one that gives image_mean and image_std"
    )


def _channels(file: Path, settings: dict[str, Any], key: str) -> tuple[float, float, float]:
    value = settings.get(key)
    if isinstance(value, int | float):
        value = [value] * 3
    if not isinstance(value, list) or len(value) != 3 or not all(map(is_number, value)):
        raise InputError(f"{file} gives no {key} of three numbers: restore it from the encoder's origin")
    return float(value[0]), float(value[1]), float(value[2])


def _scaled(channels: tuple[float, float, float], unit: float) -> tuple[float, float, float]:
    red, green, blue = channels
    return red / unit, green / unit, blue / unit


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: restore it from the encoder's origin") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} is not a JSON object: restore it from the encoder's origin")
    return value
