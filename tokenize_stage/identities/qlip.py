"""Who a `qlip` tokenizer is: the vision tower and the binary spherical quantiser of an `nvidia/QLIP-*` model.

The published weights are for non-commercial use only (NVIDIA Source Code License-NC, CC BY-NC 4.0).
A position has (in the published models) 28 bits and no stored codebook: 2^28 classes are no target for a softmax, so
the bits are cut into groups, most significant first, and each group is one code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manifests.codebook import Codebooks
from manifests.errors import InputError
from manifests.schema import TokenizerSpec
from tokenize_stage.config import QlipTokenizer
from tokenize_stage.described import remembered_spec
from tokenize_stage.encoder_files import CONFIG, encoder_sha256, locate_encoder, normalisation
from tokenize_stage.identity import Identity
from tokenize_stage.json_config import Settings, read_settings

_DEFAULT_GROUP = 14
_DEFAULT_EPS = 1e-5
_CLIP_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip
"""Of a CLIP vision tower; a saved configuration leaves out what equals them."""
_BLOCKS = {"rope": True, "subln": True, "swiglu": True, "k_bias": False, "quantizer_l2_norm": True,
           "quantizer_embed_type": "mlp"}  # fmt: skip
"""What all published models have, and what is built here."""


@dataclass(frozen=True)
class EvaShape:
    """The numbers of a tower."""

    view_size: int
    patch: int
    width: int
    inner: int
    blocks: int
    heads: int
    eps: float

    @property
    def grid(self) -> int:
        """Rows, and columns, of positions."""
        return self.view_size // self.patch

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


@dataclass(frozen=True)
class QlipFiles:
    """A model folder, and what its configuration says."""

    folder: Path
    revision: str | None
    shape: EvaShape
    bits: int
    group_bits: int

    @property
    def where(self) -> str:
        """The model, for messages."""
        return f"the QLIP model {self.folder}"

    @property
    def depth(self) -> int:
        """Groups of bits, that is codes, per position."""
        return self.bits // self.group_bits


def describe(tokenizer: QlipTokenizer) -> Identity:
    """Raises `InputError` if the folder is not a QLIP model, or its tensors are not what its configuration says."""
    files = locate(tokenizer)
    sha256 = encoder_sha256(files.folder)

    def read() -> TokenizerSpec:
        from tokenize_stage.tokenizers.qlip import check

        check(files)
        pixels = normalisation(files.folder)
        return TokenizerSpec(
            kind=tokenizer.kind,
            origin=tokenizer.path,
            weights_sha256=sha256,
            view_size=files.shape.view_size,
            grid=(files.shape.grid, files.shape.grid),
            codebook_sizes=(1 << files.group_bits,) * files.depth,
            code_dim=files.group_bits,
            residual=False,
            settings={
                "bits": files.bits,
                "group_bits": files.group_bits,
                "image_mean": list(pixels.mean),
                "image_std": list(pixels.std),
            },
        )

    spec = remembered_spec(
        tokenizer.kind,
        sha256,
        {"group_bits": files.group_bits},
        origin=tokenizer.path,
        revision=files.revision,
        read=read,
        form=TokenizerSpec,
    )
    return Identity(spec, lambda: implicit_codebooks(files.bits, files.group_bits))


def locate(tokenizer: QlipTokenizer) -> QlipFiles:
    """Find the folder and read its configuration. `InputError` if it is of another model or architecture."""
    found = locate_encoder(tokenizer.path)
    whole = read_settings(found.folder / CONFIG)
    vision = whole.values.get("vision_config")
    if not isinstance(vision, dict) or vision.get("quantizer") != "bsq":
        raise InputError(
            f"{whole.where} has no vision_config with quantizer 'bsq', so it is not the configuration of a QLIP model: "
            "give the folder of one, such as nvidia/QLIP-B-16-256"
        )
    section = whole.section("vision_config")
    for key, built in _BLOCKS.items():
        if section.values.get(key, built) != built:
            raise section.wrong(key, f"{built!r} as in every published QLIP model")
    bits = section.section("quantizer_cfg").count("embed_dim")
    return QlipFiles(found.folder, found.revision, _shape(section), bits, _group_bits(tokenizer, bits, whole.where))


def implicit_codebooks(bits: int, group_bits: int) -> Codebooks:
    """What the codes stand for: D times the same float32 (2^g, g), row k the bits of k as +-1/sqrt(bits), first bit first.

    Side by side the D vectors of a position are the quantiser's output, a point on the unit sphere.
    """
    codes_K = np.arange(1 << group_bits)
    bits_Kg = codes_K[:, None] >> np.arange(group_bits)[::-1] & 1
    book_Kg = ((2 * bits_Kg - 1) / np.sqrt(bits)).astype(np.float32)
    return [book_Kg] * (bits // group_bits)


def _shape(section: Settings) -> EvaShape:
    numbers = {key: section.count(key, default) for key, default in _CLIP_DEFAULTS.items()}
    eps = section.number("layer_norm_eps") if "layer_norm_eps" in section.values else _DEFAULT_EPS
    width, heads = numbers["hidden_size"], numbers["num_attention_heads"]
    if width % (4 * heads):
        raise section.wrong("num_attention_heads", f"a number of heads that are each a multiple of 4 wide, of {width}")
    size, patch = numbers["image_size"], numbers["patch_size"]
    if size % patch:
        raise section.wrong("image_size", f"a multiple of the patch_size {patch}")
    return EvaShape(size, patch, width, numbers["intermediate_size"], numbers["num_hidden_layers"], heads, eps)


def _group_bits(tokenizer: QlipTokenizer, bits: int, where: str) -> int:
    divisors = [size for size in range(1, min(bits, 16) + 1) if bits % size == 0]
    chosen = tokenizer.group_bits or max(size for size in divisors if size <= _DEFAULT_GROUP)
    if chosen not in divisors:
        raise InputError(
            f"group_bits {chosen} does not divide the {bits} bits of {where}: choose one of {', '.join(map(str, divisors))}"
        )
    return chosen
