"""Who an `hf_vq` tokenizer is: an image VQ model that transformers ships, alone or inside the model it was made for.

| family | model folders, by `model_type` | what its codes say |
|---|---|---|
| Chameleon | `chameleon_vqgan`, `chameleon` | appearance: a VQGAN that rebuilds pixels |
| Emu3 | `emu3_vqgan`, `emu3` | appearance: a VQGAN for images and video |
| Janus | `janus_vqgan`, `janus` | appearance: the VQGAN of LlamaGen |
| GLM-Image | `glm_image` | semantic: features of a vision transformer are quantised, by cosine |

Of a whole model only the weight files that hold the VQ model are fetched, hashed and opened.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from manifests.codebook import Codebooks
from manifests.errors import InputError
from manifests.hashes import file_sha256
from manifests.schema import TokenizerSpec
from tokenize_stage.config import HfVqTokenizer
from tokenize_stage.described import remembered_spec
from tokenize_stage.encoder_files import (
    CONFIG,
    PREPROCESSORS,
    WEIGHTS,
    WEIGHTS_INDEX,
    Normalisation,
    read_normalisation,
)
from tokenize_stage.hub import Located, locate_file, locate_folder, parse_reference
from tokenize_stage.identity import Identity
from tokenize_stage.json_config import Settings, read_settings

Family = Literal["chameleon", "emu3", "janus", "glm_image"]

_ALONE: dict[str, Family] = {"chameleon_vqgan": "chameleon", "emu3_vqgan": "emu3", "janus_vqgan": "janus"}
_WHOLE: tuple[Family, ...] = ("chameleon", "emu3", "janus", "glm_image")

OWN_PART = re.compile(r"(?P<prefix>(model\.)?)(vqmodel|visual)\..+")
"""Keys, in the checkpoint of a whole model, of what makes the codes."""

_CHAMELEON = 1 / (0.0078 * 255)
DEFAULTS: dict[Family, Normalisation] = {"chameleon": Normalisation((_CHAMELEON,) * 3, (_CHAMELEON,) * 3)}
"""Chameleon's image processor makes `0.0078 pixel - 1`. The ones of the other families default to CLIP's mean and std in
transformers, which is not what every published VQ model was trained with: there the file has to be given."""


@dataclass(frozen=True)
class HfVqFiles:
    """A configured VQ model, its files found."""

    folder: Located
    family: Family
    whole: bool
    """The folder is that of a whole model, which holds the VQ model beside a language model."""
    weights: tuple[Path, ...]
    sha256: dict[str, str]
    pixels: Normalisation
    view_size: int | None
    """None: the family's default."""

    @property
    def config(self) -> Path:
        """The model's configuration."""
        return self.folder.path / CONFIG

    @property
    def where(self) -> str:
        """The model, for messages."""
        return f"the VQ model {self.folder.path}"


def describe(tokenizer: HfVqTokenizer) -> Identity:
    """Raises `InputError` if the folder holds none of these models, or its tensors are not what its config says."""
    files = locate(tokenizer)

    def read() -> TokenizerSpec:
        from tokenize_stage.tokenizers.hf_vq import read_shape

        shape = read_shape(files)
        return TokenizerSpec(
            kind=tokenizer.kind,
            origin=tokenizer.path,
            weights_sha256=files.sha256,
            view_size=shape.view_size,
            grid=(shape.edge, shape.edge),
            codebook_sizes=(shape.codes,),
            code_dim=shape.code_dim,
            residual=True,
            settings={
                "family": files.family,
                "metric": "cosine" if files.family == "glm_image" else "squared_l2",
                "image_mean": list(files.pixels.mean),
                "image_std": list(files.pixels.std),
            },
        )

    spec = remembered_spec(
        tokenizer.kind,
        files.sha256,
        {"view_size": tokenizer.view_size, "image_mean": files.pixels.mean, "image_std": files.pixels.std},
        origin=tokenizer.path,
        revision=files.folder.revision,
        read=read,
        form=TokenizerSpec,
    )
    return Identity(spec, partial(_codebooks, files))


def locate(tokenizer: HfVqTokenizer) -> HfVqFiles:
    """Find the files, told by config.json which of the families it is."""
    folder = locate_folder(tokenizer.path, [CONFIG, *PREPROCESSORS, WEIGHTS, WEIGHTS_INDEX])
    config = folder.path / CONFIG
    if not config.is_file():
        raise InputError(f"{tokenizer.path} has no {CONFIG}: give the folder of a model that transformers saved")
    settings = read_settings(config)
    family, whole = _family(settings)
    weights = _weights(tokenizer.path, folder, whole)
    return HfVqFiles(
        folder=folder,
        family=family,
        whole=whole,
        weights=weights,
        sha256={"config": file_sha256(config)} | {file.name: file_sha256(file) for file in weights},
        pixels=_normalisation(tokenizer, folder.path, family),
        view_size=tokenizer.view_size,
    )


def _family(settings: Settings) -> tuple[Family, bool]:
    kind = settings.text("model_type")
    if kind in _ALONE:
        return _ALONE[kind], False
    for family in _WHOLE:
        if kind == family:
            return family, True
    if kind in ("glm_image_vqmodel", "glm_image_vision"):
        raise InputError(
            f"{settings.where} is of a part of GLM-Image (model_type {kind}), but its codes take both the vision model "
            "and the VQ model: give the folder that holds both (model_type glm_image)"
        )
    known = ", ".join([*_ALONE, *_WHOLE])
    raise InputError(f"{settings.where} is of a {kind}, which is no image VQ model known here: give one of {known}")


def _weights(reference: str, folder: Located, whole: bool) -> tuple[Path, ...]:
    """The safetensors files that hold the VQ model; those of a hub model are fetched one by one."""
    if (folder.path / WEIGHTS).is_file():
        return (folder.path / WEIGHTS,)
    index = folder.path / WEIGHTS_INDEX
    if not index.is_file():
        raise InputError(f"{folder.path} has no {WEIGHTS}: save the model again in the safetensors format")
    files = read_settings(index).section("weight_map").values
    names = sorted({str(name) for key, name in files.items() if not whole or OWN_PART.fullmatch(key)})
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise InputError(f"{index} names no safetensors files of a VQ model: download the model again")
    hub = parse_reference(reference) if folder.revision else None
    if hub is None:
        return tuple(locate_file(str(folder.path), name=name).path for name in names)
    below = f"hf://{hub.model}@{folder.revision}/" + (f"{hub.file.rstrip('/')}/" if hub.file else "")
    return tuple(locate_file(below + name).path for name in names)


def _normalisation(tokenizer: HfVqTokenizer, folder: Path, family: Family) -> Normalisation:
    if tokenizer.preprocessor is not None:
        return read_normalisation(locate_file(tokenizer.preprocessor, name=PREPROCESSORS[0]).path)
    for name in PREPROCESSORS:
        if (folder / name).is_file():
            return read_normalisation(folder / name)
    if family not in DEFAULTS:
        raise InputError(
            f"{folder} has no {PREPROCESSORS[0]}, which says how its pixels are normalised: set preprocessor to a file "
            "with the image_mean and image_std that the model was trained with"
        )
    return DEFAULTS[family]


def _codebooks(files: HfVqFiles) -> Codebooks:
    from tokenize_stage.tokenizers.hf_vq import read_codebooks

    return read_codebooks(files)
