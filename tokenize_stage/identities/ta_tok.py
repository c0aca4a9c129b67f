"""Who a `ta_tok` tokenizer is: the text-aligned tokenizer of Tar, one file `{"model": {"args": ..., "sd": ...}}`.

The published file is `ta_tok.pth` of `csuhan/TA-Tok`; its encoder has the architecture of
`google/siglip2-so400m-patch14-384`. Its sizes and flags stand only among the constructor arguments in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.codebook import Codebooks
from manifests.errors import InputError
from manifests.hashes import file_sha256
from manifests.schema import TokenizerSpec
from tokenize_stage.config import TaTokTokenizer
from tokenize_stage.described import remembered_spec
from tokenize_stage.hub import Located, locate_file
from tokenize_stage.identity import Identity
from tokenize_stage.json_config import Settings
from tokenize_stage.siglip_config import SiglipConfig, read_siglip_config

CHECKPOINT = "ta_tok.pth"


@dataclass(frozen=True)
class TaTokFiles:
    """The checkpoint, and the architecture of its encoder."""

    checkpoint: Located
    encoder_config: Path
    siglip: SiglipConfig
    pool_scale: int | None
    """None: what the checkpoint says."""

    @property
    def where(self) -> str:
        """The checkpoint, for messages."""
        return f"the TA-Tok checkpoint {self.checkpoint.path}"


@dataclass(frozen=True)
class TaTokArguments:
    """What the checkpoint's own arguments and the recipe decide."""

    layers: int
    """Layers that run; the features are `hidden_states[layers]`."""
    pool_scale: int
    codes: int
    code_dim: int
    normalised: bool
    """Features and table are compared by cosine; otherwise by squared L2, as they are."""


def describe(tokenizer: TaTokTokenizer) -> Identity:
    """Raises `InputError` if the file is not a TA-Tok checkpoint, or its tensors are not what its arguments say."""
    files = locate(tokenizer)

    def read() -> TokenizerSpec:
        from tokenize_stage.tokenizers.ta_tok import check

        arguments, mean, std = check(files)
        rows, columns = files.siglip.grid
        return TokenizerSpec(
            kind=tokenizer.kind,
            origin=tokenizer.checkpoint,
            weights_sha256=weights_sha256,
            view_size=files.siglip.image_size,
            grid=(rows // arguments.pool_scale, columns // arguments.pool_scale),
            codebook_sizes=(arguments.codes,),
            code_dim=arguments.code_dim,
            residual=True,
            settings={
                "layer": arguments.layers,
                "pool_scale": arguments.pool_scale,
                "metric": "cosine" if arguments.normalised else "squared_l2",
                "image_mean": mean,
                "image_std": std,
            },
        )

    weights_sha256 = {
        "checkpoint": file_sha256(files.checkpoint.path),
        "encoder_config": file_sha256(files.encoder_config),
    }
    spec = remembered_spec(
        tokenizer.kind,
        weights_sha256,
        {"pool_scale": tokenizer.pool_scale},
        origin=tokenizer.checkpoint,
        revision=files.checkpoint.revision,
        read=read,
        form=TokenizerSpec,
    )
    return Identity(spec, lambda: _codebooks(files))


def locate(tokenizer: TaTokTokenizer) -> TaTokFiles:
    """Find the two files and read the encoder's configuration."""
    encoder = locate_file(tokenizer.encoder_config, name="config.json").path
    return TaTokFiles(
        locate_file(tokenizer.checkpoint, name=CHECKPOINT), encoder, read_siglip_config(encoder), tokenizer.pool_scale
    )


def read_arguments(files: TaTokFiles, values: Any) -> TaTokArguments:
    """The constructor arguments of the checkpoint, as far as they decide an id.

    Whether ids are drawn (`stochastic`) and how sharply (`stochastic_temperature`) is left out: here they never are.
    """
    if not isinstance(values, dict):
        raise InputError(f"{files.where} has no model.args of a TA-Tok: check which checkpoint it is")
    arguments = Settings(values, f"{files.where}: model.args")
    siglip = files.siglip
    edge = arguments.count("input_size", 384)
    if edge != siglip.image_size:
        raise InputError(
            f"{files.where} takes views of {edge} pixels, but the SigLIP of {files.encoder_config} those of "
            f"{siglip.image_size}: give the encoder_config that it was trained with"
        )
    states = siglip.layers + 1
    layer = arguments.values.get("select_layer_id", -2)
    if not isinstance(layer, int) or not -states < layer < states:
        raise arguments.wrong("select_layer_id", f"one of the {states} hidden states of its SigLIP")
    scale = files.pool_scale or arguments.count("pool_scale", 1)
    if scale > min(siglip.grid):
        raise InputError(
            f"a pool_scale of {scale} leaves no position of the grid {siglip.grid} of {files.encoder_config}: lower it"
        )
    bottleneck = arguments.section("bottleneck").section("args")
    regulariser = bottleneck.section("regularizer")
    if regulariser.text("name") != "simvq":
        raise regulariser.wrong("name", "simvq, the one kind of quantiser known here")
    quantiser = regulariser.section("args")
    width = bottleneck.values.get("bottleneck_dim")
    code_dim = siglip.width if isinstance(width, int) and width <= 0 else bottleneck.count("bottleneck_dim")
    return TaTokArguments(
        layer % states, scale, quantiser.count("codebook_size"), code_dim, quantiser.flag("l2_normalized", False)
    )


def _codebooks(files: TaTokFiles) -> Codebooks:
    from tokenize_stage.tokenizers.ta_tok import read_codebooks

    return read_codebooks(files)
