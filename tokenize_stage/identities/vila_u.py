"""Who a `vila_u` tokenizer is: the vision tower of a VILA-U model (RQ-SigLIP), as its folder `vision_tower/` holds it.

The published folder is `vision_tower` of `mit-han-lab/vila-u-7b-256`. Facts of the layout: `config.json` keeps the
quantiser under `rqvaesiglip` and names there, as `pretrained_model`, the SigLIP whose architecture it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from manifests.codebook import Codebooks
from manifests.errors import InputError
from manifests.hashes import file_sha256
from manifests.schema import TokenizerSpec
from tokenize_stage.config import VilaUTokenizer
from tokenize_stage.described import remembered_spec
from tokenize_stage.encoder_files import CONFIG, WEIGHTS, WEIGHTS_INDEX, weight_files
from tokenize_stage.hub import Located, locate_folder
from tokenize_stage.identity import Identity
from tokenize_stage.json_config import Settings, read_settings
from tokenize_stage.siglip_config import MEAN, STD, SiglipConfig, locate_siglip_config, read_siglip_config

LAYERS_LEFT_OUT = 1
"""The quantiser takes `hidden_states[-2]`: the output of the last layer but one."""

MOST_DEPTHS = 64
"""A configuration that asks for more is not believed."""


@dataclass(frozen=True)
class VilaUFiles:
    """The files of a tower, and what its two configurations say."""

    folder: Located
    encoder_config: Path
    siglip: SiglipConfig
    codes: int
    depth: int
    shared: bool
    """One codebook serves every depth."""

    @property
    def where(self) -> str:
        """The tower, for messages."""
        return f"the VILA-U tower {self.folder.path}"

    @property
    def layers(self) -> int:
        """Layers that run."""
        return self.siglip.layers - LAYERS_LEFT_OUT


def describe(tokenizer: VilaUTokenizer) -> Identity:
    """Raises `InputError` if the folder is not a VILA-U tower, or its tensors are not what its configuration says."""
    files = locate(tokenizer)
    folder = files.folder.path
    sha256 = {"config": folder / CONFIG, "encoder_config": files.encoder_config} | {
        name: folder / name for name in weight_files(folder)
    }

    def read() -> TokenizerSpec:
        from tokenize_stage.tokenizers.vila_u import check

        check(files)
        return TokenizerSpec(
            kind=tokenizer.kind,
            origin=tokenizer.path,
            weights_sha256=weights_sha256,
            view_size=files.siglip.image_size,
            grid=files.siglip.grid,
            codebook_sizes=(files.codes,) * files.depth,
            code_dim=files.siglip.width,
            residual=True,
            settings={"layer": files.layers, "image_mean": list(MEAN), "image_std": list(STD)},
        )

    weights_sha256 = {role: file_sha256(file) for role, file in sha256.items()}
    spec = remembered_spec(
        tokenizer.kind,
        weights_sha256,
        {},
        origin=tokenizer.path,
        revision=files.folder.revision,
        read=read,
        form=TokenizerSpec,
    )
    return Identity(spec, lambda: _codebooks(files))


def locate(tokenizer: VilaUTokenizer) -> VilaUFiles:
    """Find the files and read the two configurations, which must agree with each other."""
    folder = locate_folder(tokenizer.path, [CONFIG, "model*.safetensors", WEIGHTS, WEIGHTS_INDEX])
    config = folder.path / CONFIG
    if not config.is_file():
        raise InputError(f"{tokenizer.path} has no {CONFIG}: give the folder vision_tower of a VILA-U model")
    whole = read_settings(config)
    if "rqvaesiglip" not in whole.values:
        raise InputError(
            f"{config} has no rqvaesiglip, so it is not the configuration of a VILA-U tower: "
            "give the folder vision_tower of a VILA-U model"
        )
    quantiser = whole.section("rqvaesiglip")
    encoder = locate_siglip_config(tokenizer.encoder_config, quantiser.values.get("pretrained_model"), config)
    siglip = read_siglip_config(encoder.path)
    *grid, depth = quantiser.counts("code_shape", 3)
    if depth > MOST_DEPTHS:
        raise quantiser.wrong("code_shape", f"rows, columns and up to {MOST_DEPTHS} depths")
    _agree(quantiser, "code_shape", tuple(grid), siglip.grid, encoder.path)
    _agree(quantiser, "embed_dim", quantiser.count("embed_dim"), siglip.width, encoder.path)
    shared = quantiser.flag("shared_codebook")
    return VilaUFiles(folder, encoder.path, siglip, quantiser.count("n_embed"), depth, shared)


def _agree(quantiser: Settings, key: str, found: object, of_encoder: object, file: Path) -> None:
    if found != of_encoder:
        raise InputError(
            f"{quantiser.where} gives {found} as {key}, but the SigLIP of {file} has {of_encoder}: "
            "set encoder_config to the config.json of the SigLIP that it was trained with"
        )


def _codebooks(files: VilaUFiles) -> Codebooks:
    from tokenize_stage.tokenizers.vila_u import read_codebooks

    return read_codebooks(files)
