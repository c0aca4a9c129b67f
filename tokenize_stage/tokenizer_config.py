"""What turns views into codes or features: the tokenizers of a recipe, one model a kind. Imports no torch and no ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from manifests.paths import HubOrPath
from tokenize_stage.stage_model import StageModel

ComputeDtype = Literal["float32", "bfloat16"]


class FittedTokenizer(StageModel):
    """A Hugging Face vision encoder and the codebooks that `asvr fit-codebook` learnt on it."""

    kind: Literal["fitted"] = "fitted"
    path: Path = Field(description="folder that `asvr fit-codebook` wrote")


class DualTokenTokenizer(StageModel):
    """A DualToken checkpoint: SigLIP features of two depths, each with its residual codebooks."""

    kind: Literal["dualtoken"] = "dualtoken"
    config: HubOrPath = Field(description="JSON file of the tokenizer's configuration")
    checkpoint: HubOrPath = Field(description="file with the weights, as torch.save wrote it")
    encoder_config: HubOrPath | None = Field(
        default=None, description="config.json of its SigLIP; default: what `config` names as `pretrained_model`"
    )
    branch: Literal["semantic", "appearance"] = "semantic"


class VilaUTokenizer(StageModel):
    """The vision tower of a VILA-U model."""

    kind: Literal["vila_u"] = "vila_u"
    path: HubOrPath = Field(description="folder of the tower: config.json and safetensors weights")
    encoder_config: HubOrPath | None = Field(
        default=None, description="config.json of its SigLIP; default: what config.json names as `pretrained_model`"
    )


class TaTokTokenizer(StageModel):
    """A TA-Tok checkpoint: one code a position, always the nearest one."""

    kind: Literal["ta_tok"] = "ta_tok"
    checkpoint: HubOrPath = Field(description="`ta_tok.pth`")
    encoder_config: HubOrPath = Field(description="config.json of its SigLIP")
    pool_scale: PositiveInt | None = Field(
        default=None, description="edge of the squares of positions that become one; default: what the checkpoint says"
    )


class ViTaminConfig(StageModel):
    """The shape of a ViTamin encoder, which a checkpoint does not tell in full."""

    widths: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(description="of the two stages and the transformer")
    conv_blocks: tuple[PositiveInt, PositiveInt] = Field(description="blocks of the two convolutional stages")
    blocks: PositiveInt = Field(description="transformer blocks")
    heads: PositiveInt = Field(description="attention heads of a transformer block")

    @model_validator(mode="after")
    def _heads_divide(self) -> ViTaminConfig:
        if self.widths[-1] % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.widths[-1]}")
        return self


class UniTokTokenizer(StageModel):
    """A UniTok checkpoint: independent sub-codebooks, not residual ones."""

    kind: Literal["unitok"] = "unitok"
    checkpoint: HubOrPath = Field(description="`unitok_tokenizer.pth`")
    encoder: ViTaminConfig | None = Field(
        default=None, description="default: that of the published ViTamin which the checkpoint names"
    )


class QlipTokenizer(StageModel):
    """A QLIP model: the bits of its binary spherical quantiser, grouped into codes.

    The published weights are for non-commercial use only.
    """

    kind: Literal["qlip"] = "qlip"
    path: HubOrPath = Field(description="folder of the model: config.json and safetensors weights")
    group_bits: PositiveInt | None = Field(
        default=None,
        le=16,
        description="bits that make one code, a divisor of the model's; default: the largest up to 14 (of 28 bits: 14)",
    )


class HfVqTokenizer(StageModel):
    """An image VQ model that transformers ships: Chameleon, Emu3, Janus or GLM-Image."""

    kind: Literal["hf_vq"] = "hf_vq"
    path: HubOrPath = Field(description="folder of the VQ model, or of a whole model that holds one")
    preprocessor: HubOrPath | None = Field(
        default=None, description="preprocessor_config.json with its image_mean and image_std; default: that of `path`"
    )
    view_size: PositiveInt | None = Field(
        default=None,
        le=4096,
        description="edge of a view, any multiple of the model's stride; default: Chameleon and Janus their own "
        "(512 and 384 as published), Emu3 and GLM-Image 512",
    )


class EncoderConfig(StageModel):
    """A frozen encoder: its features are stored, or a codebook is fitted on them."""

    path: HubOrPath = Field(description="folder or hub id of a Hugging Face vision model")
    layer: int = Field(default=-2, description="index into `hidden_states`; layers above it are not run")
    dtype: ComputeDtype = "float32"


class FeaturesTokenizer(StageModel):
    """The hidden states of a vision encoder, as they are: shards of kind `features`."""

    kind: Literal["features"] = "features"
    encoder: EncoderConfig
    view_size: PositiveInt | None = Field(
        default=None, le=4096, description="edge of a view; default: the size the encoder was trained on"
    )


class VaeTokenizer(StageModel):
    """The posterior of an image VAE: mean and log-variance of its latents, as shards of kind `features`."""

    kind: Literal["vae"] = "vae"
    path: HubOrPath = Field(description="folder of a diffusers AutoencoderKL: config.json and safetensors weights")
    view_size: PositiveInt | None = Field(
        default=None, le=4096, description="edge of a view, any multiple of the VAE's stride; default: its sample_size"
    )


TokenizerConfig = Annotated[
    FittedTokenizer
    | DualTokenTokenizer
    | VilaUTokenizer
    | TaTokTokenizer
    | UniTokTokenizer
    | QlipTokenizer
    | HfVqTokenizer
    | FeaturesTokenizer
    | VaeTokenizer,
    Field(discriminator="kind"),
]
"""`kind` decides the keys, and the modules `identities.KIND` and `tokenizers.KIND` that know the family."""
