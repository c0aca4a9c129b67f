"""Who a DualToken tokenizer is: which of its two generations, which branch, and where in the encoder that starts.

Both generations take features of two depths of one SigLIP and quantise each residually. The first (which ASVR used) takes
the semantic ones as they are and puts the appearance ones through a convolution block; the second puts both through an
attention projection to a narrow space, and adds a shortcut from a still earlier layer to the appearance ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from manifests.codebook import Codebooks
from manifests.errors import InputError
from manifests.hashes import file_sha256
from manifests.schema import TokenizerSpec
from tokenize_stage.config import DualTokenTokenizer
from tokenize_stage.described import remembered_spec
from tokenize_stage.hub import locate_file
from tokenize_stage.identity import Identity
from tokenize_stage.json_config import Settings, read_settings
from tokenize_stage.siglip_config import MEAN, STD, SiglipConfig, locate_siglip_config, read_siglip_config

SEMANTIC_FROM_END = 1
APPEARANCE_FROM_END = 21
"""Blocks left out in the first generation: its code counts layers from the end, 26 and 6 of SigLIP-so400m's 27 run."""

NORM_GROUPS = 32
"""Groups of the group norms in the first generation's appearance branch."""


@dataclass(frozen=True)
class Branch:
    """One branch of a checkpoint; names are prefixes of its keys."""

    generation: Literal[1, 2]
    quantizer: str
    projection: str | None
    layer: int
    """Index into `hidden_states` of the features."""
    shortcut: tuple[str, int, float] | None
    """Another projection, the layer it takes, and its weight in the sum."""
    sizes: tuple[int, ...]
    code_dim: int
    grid: tuple[int, int]
    shared: bool
    """All depths have one codebook, stored once or once for each depth."""

    @property
    def blocks(self) -> int:
        """Blocks of the encoder that run."""
        return max(self.layer, self.shortcut[1] if self.shortcut else 0)


@dataclass(frozen=True)
class DualTokenFiles:
    """A configured DualToken tokenizer, its files found and its two configurations read."""

    config: Path
    checkpoint: Path
    revision: str | None
    siglip: SiglipConfig
    branch: Branch
    sha256: dict[str, str]


def describe(tokenizer: DualTokenTokenizer) -> Identity:
    """Raises `InputError` for files that are missing, of another kind, or of different generations."""
    files = find(tokenizer)
    branch = files.branch
    spec = TokenizerSpec(
        kind=tokenizer.kind,
        origin=tokenizer.checkpoint,
        revision=files.revision,
        weights_sha256=files.sha256,
        view_size=files.siglip.image_size,
        grid=branch.grid,
        codebook_sizes=branch.sizes,
        code_dim=branch.code_dim,
        residual=True,
        settings={
            "branch": tokenizer.branch,
            "generation": branch.generation,
            "layer": branch.layer,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        },
    )
    spec = remembered_spec(
        spec.kind,
        spec.weights_sha256,
        {"branch": tokenizer.branch},
        origin=spec.origin,
        revision=spec.revision,
        read=lambda: _checked(files, spec),
        form=TokenizerSpec,
    )
    return Identity(spec, partial(_codebooks, files))


def find(tokenizer: DualTokenTokenizer) -> DualTokenFiles:
    """The files of a configured tokenizer. Raises `InputError` if one is missing or the configurations disagree."""
    config = locate_file(tokenizer.config, name="config.json").path
    settings = read_settings(config).section("rqvaesiglip")
    encoder = locate_siglip_config(tokenizer.encoder_config, settings.values.get("pretrained_model"), config).path
    checkpoint = locate_file(tokenizer.checkpoint)
    siglip = read_siglip_config(encoder)
    branch = _branch(settings, tokenizer.branch, siglip)
    if branch.grid != siglip.grid:
        raise InputError(
            f"{config} has a grid of {branch.grid} positions, but the encoder {encoder} makes {siglip.grid}: "
            "set encoder_config to the config.json of the SigLIP it was trained on"
        )
    sha256 = {
        "checkpoint": file_sha256(checkpoint.path),
        "config": file_sha256(config),
        "encoder_config": file_sha256(encoder),
    }
    return DualTokenFiles(config, checkpoint.path, checkpoint.revision, siglip, branch, sha256)


def _checked(files: DualTokenFiles, spec: TokenizerSpec) -> TokenizerSpec:
    """`spec`, once the checkpoint was seen to hold what it says."""
    from tokenize_stage.tokenizers.dualtoken import check_checkpoint

    check_checkpoint(files)
    return spec


def _codebooks(files: DualTokenFiles) -> Codebooks:
    from tokenize_stage.tokenizers.dualtoken import read_codebooks

    return read_codebooks(files)


def _branch(settings: Settings, branch: str, siglip: SiglipConfig) -> Branch:
    semantic = branch == "semantic"
    if "vq_sem" in settings.values:
        return _second_generation(settings, semantic, siglip)
    if "vq_semantic" in settings.values:
        raise InputError(
            f"{settings.where} is of the code between DualToken's two generations (it has vq_semantic): "
            "give a configuration of the first (n_embed) or of the second (vq_sem)"
        )
    width = settings.count("embed_dim")
    if width != siglip.width:
        raise InputError(
            f"{settings.where}: embed_dim is {width}, but the features of {siglip.where} are {siglip.width} wide and the "
            "generation that ASVR used takes them as they are: give its configuration, or encoder_config of its SigLIP"
        )
    layer = siglip.layers - (SEMANTIC_FROM_END if semantic else APPEARANCE_FROM_END)
    if layer < 1:
        raise InputError(
            f"{siglip.where} has {siglip.layers} layers, but this branch starts {APPEARANCE_FROM_END} before the last: "
            "set encoder_config to the config.json of the SigLIP it was trained on"
        )
    if not semantic and width % NORM_GROUPS:
        raise settings.wrong("embed_dim", f"a multiple of {NORM_GROUPS}, which the appearance branch normalises by")
    sizes, grid = _codes(settings, width)
    return Branch(
        generation=1,
        quantizer="quantizer_semantic" if semantic else "quantizer",
        projection=None if semantic else "prequant_visual",
        layer=layer,
        shortcut=None,
        sizes=sizes,
        code_dim=width,
        grid=grid,
        shared=settings.flag("shared_codebook", False),
    )


def _second_generation(settings: Settings, semantic: bool, siglip: SiglipConfig) -> Branch:
    name = "sem" if semantic else "pix"
    quantizer = settings.section(f"vq_{name}")
    width = quantizer.count("embed_dim")
    if siglip.width % width or siglip.width == width:
        raise InputError(
            f"{quantizer.where}: embed_dim {width} is not a proper part of the encoder's width {siglip.width}: "
            "set encoder_config to the config.json of the SigLIP it was trained on"
        )
    layer = settings.count("layer_sem" if semantic else "layer_recon")
    shortcut = None
    if not semantic and settings.values.get("layer_shortcut") is not None:
        shortcut = ("prequant_shortcut", settings.count("layer_shortcut"), settings.number("weight_shortcut"))
    if max(layer, shortcut[1] if shortcut else 0) > siglip.layers:
        raise InputError(
            f"{settings.where} takes features of layer {layer}, but {siglip.where} has {siglip.layers}: "
            "set encoder_config to the config.json of the SigLIP it was trained on"
        )
    sizes, grid = _codes(quantizer, width)
    return Branch(
        generation=2,
        quantizer=f"quantizer_{name}",
        projection=f"prequant_{name}",
        layer=layer,
        shortcut=shortcut,
        sizes=sizes,
        code_dim=width,
        grid=grid,
        shared=quantizer.flag("shared_codebook", False),
    )


def _codes(settings: Settings, width: int) -> tuple[tuple[int, ...], tuple[int, int]]:
    """K of each depth, and the grid."""
    rows, columns, depth = settings.counts("code_shape", 3)
    if settings.counts("latent_shape", 3) != (rows, columns, width):
        raise settings.wrong("latent_shape", f"[{rows}, {columns}, {width}] as code_shape and embed_dim say")
    return settings.counts("n_embed", depth), (rows, columns)
