"""The architecture of a SigLIP vision tower, from the `config.json` of a hub model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import InputError
from tokenize_stage.hub import Located, locate_file
from tokenize_stage.json_config import read_settings

MEAN = STD = (0.5, 0.5, 0.5)
"""What every SigLIP is fed: pixels in [-1, 1]."""

_KINDS = ("siglip", "siglip_vision_model")
_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "image_size": 224, "patch_size": 16}
"""transformers' own, which files leave out."""
_OTHER_COUNTS = {"intermediate_size": 3072, "num_attention_heads": 12, "num_channels": 3}
_MOST_LAYERS = 1000
"""A file that asks for more is not believed: building them would take for ever."""


@dataclass(frozen=True)
class SiglipConfig:
    """What is known of a tower without building it; `values` are the keywords of transformers' SiglipVisionConfig."""

    width: int
    layers: int
    image_size: int
    patch_size: int
    values: dict[str, Any]
    where: str

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of positions in a view."""
        side = self.image_size // self.patch_size
        return side, side


def read_siglip_config(file: Path) -> SiglipConfig:
    """The vision tower of a SigLIP (or fixed-size SigLIP 2) `config.json`. `InputError` if it is of another model."""
    whole = read_settings(file)
    vision = whole.section("vision_config") if "vision_config" in whole.values else whole
    kind = whole.values.get("model_type", "siglip")
    if kind not in _KINDS:
        raise InputError(f"{file} is the configuration of a {kind} model: give encoder_config of the SigLIP it uses")
    width, layers, image_size, patch_size = (vision.count(key, default) for key, default in _DEFAULTS.items())
    _, heads, channels = (vision.count(key, default) for key, default in _OTHER_COUNTS.items())
    if layers > _MOST_LAYERS:
        raise vision.wrong("num_hidden_layers", f"a number of layers up to {_MOST_LAYERS}")
    if width % heads:
        raise vision.wrong("num_attention_heads", f"a divisor of the width {width}")
    if channels != 3:
        raise vision.wrong("num_channels", "3, for red, green and blue")
    if image_size < patch_size:
        raise InputError(f"{file} has patches of {patch_size} pixels in images of {image_size}: check encoder_config")
    return SiglipConfig(width, layers, image_size, patch_size, dict(vision.values), str(file))


def locate_siglip_config(given: str | None, named: object, config: Path) -> Located:
    """The encoder's config.json: `given` in the recipe, else what `config` names (relative to itself, or a hub id)."""
    if given is not None:
        return locate_file(given, name="config.json")
    if not isinstance(named, str) or not named:
        raise InputError(f"{config} names no pretrained_model: set encoder_config to the config.json of its SigLIP")
    beside = config.parent / named
    reference = str(beside) if beside.exists() else named
    try:
        return locate_file(reference, name="config.json")
    except InputError as error:
        raise InputError(
            f"{config} names the encoder {named}, which cannot be found: "
            "set encoder_config to the config.json of its SigLIP"
        ) from error
