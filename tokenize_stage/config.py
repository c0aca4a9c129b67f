"""What a tokenize job and a codebook fit are told: the part of a recipe this stage owns. Imports no torch and no ray.

Paths are used as they stand; whoever reads a recipe resolves them against the recipe file first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from manifests.decode import DEFAULT_MAX_PIXELS
from manifests.geometry import background_from_mean
from manifests.paths import HubOrPath
from manifests.schema import Geometry

ComputeDtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


class StageModel(BaseModel):
    """Base of this stage's configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FolderSource(StageModel):
    """Every picture below a folder, in the order of its path."""

    kind: Literal["folder"] = "folder"
    path: Path = Field(description="folder that is searched, with everything below it")


class LlavaSource(StageModel):
    """The pictures that a LLaVA JSON list or JSONL file (also `.zst`) refers to, in order of first appearance."""

    kind: Literal["llava"] = "llava"
    path: Path = Field(description="JSON or JSONL file with the conversations")
    image_root: Path = Field(description="folder that the `image` values are relative to")


class GeometryConfig(StageModel):
    """How a decoded image becomes views: `manifests.schema.Geometry`, with a bar colour that may be left open."""

    mode: Literal["squash", "pad", "crop"]
    size: PositiveInt = Field(description="edge of a view in pixels", le=4096)
    background: tuple[int, int, int] | None = Field(
        default=None, description="RGB of the letterbox bars of `pad`, default: int(255 x the encoder's mean), as LLaVA"
    )

    def resolve(self, image_mean: Sequence[float] = (0.5, 0.5, 0.5)) -> Geometry:
        """The geometry with its colour decided."""
        background = self.background if self.background is not None else background_from_mean(image_mean)
        return Geometry(mode=self.mode, size=self.size, background=background)

    @field_validator("background")
    @classmethod
    def _bytes(cls, value: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        if value is not None and any(not 0 <= channel <= 255 for channel in value):
            raise ValueError("background channels are integers from 0 to 255")
        return value


SourceConfig = Annotated[FolderSource | LlavaSource, Field(discriminator="kind")]


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


class RayConfig(StageModel):
    """How many workers of what size `engine: ray` asks the cluster for."""

    address: str = Field(
        default="auto",
        description="`auto`: the running cluster, else a new local one; `local`: a new local one; or `ray://HOST:PORT`",
    )
    num_workers: PositiveInt | None = Field(default=None, description="default: one per GPU, without GPUs one per node")
    cpus_per_worker: PositiveFloat = Field(default=1.0, description="cores reserved for a worker")
    gpus_per_worker: NonNegativeFloat | None = Field(default=None, description="default: 1 if the cluster has GPUs")


class TokenSetConfig(StageModel):
    """One named token set of a recipe: a source, a geometry, a tokenizer and the output folder."""

    source: SourceConfig
    geometry: GeometryConfig
    tokenizer: TokenizerConfig
    output: Path
    engine: Literal["local", "ray"] = "local"
    ray: RayConfig = RayConfig()
    unit_size: PositiveInt = Field(default=4096, description="images per unit, which is committed at once")
    max_reject_rate: float = Field(default=0.01, ge=0, le=1, description="share of the images that may be rejects")
    max_pixels: PositiveInt = Field(default=DEFAULT_MAX_PIXELS, description="larger images are rejects")
    dtype: ComputeDtype | None = Field(
        default=None,
        description="arithmetic of the encoder, default float32; the search is exact anyway. Of kind features it is "
        "tokenizer.encoder.dtype, in which they are also stored",
    )
    device: Device = "auto"
    batch_size: PositiveInt = Field(default=64, description="views per encoder call; the last batch is padded to it")
    torch_threads: PositiveInt | None = Field(
        default=None, description="threads of CPU arithmetic in a worker, default: the cores of the driver's machine"
    )
    decode_threads: PositiveInt | None = Field(default=None, description="default: the worker's cores, at most 16")

    @property
    def compute_dtype(self) -> ComputeDtype:
        """The arithmetic of the encoder."""
        return (
            self.tokenizer.encoder.dtype if isinstance(self.tokenizer, FeaturesTokenizer) else self.dtype or "float32"
        )

    @model_validator(mode="after")
    def _one_dtype(self) -> TokenSetConfig:
        if isinstance(self.tokenizer, FeaturesTokenizer) and self.dtype not in (None, self.compute_dtype):
            raise ValueError(f"dtype is {self.dtype}, tokenizer.encoder.dtype {self.compute_dtype}: leave out dtype")
        if isinstance(self.tokenizer, VaeTokenizer) and self.compute_dtype != "float32":
            raise ValueError("a VAE computes in float32, since its log-variances need that: leave out dtype")
        return self


class CodebookConfig(StageModel):
    """One `asvr fit-codebook` run: codebooks learnt from the features of a sample of images."""

    source: SourceConfig
    geometry: GeometryConfig
    encoder: EncoderConfig
    output: Path
    method: Literal["residual", "product"] = Field(
        default="residual",
        description="`residual`: each codebook quantises what those before it left over; `product`: a feature is cut "
        "into `depth` chunks of equal width, each with a codebook of its own",
    )
    depth: PositiveInt = Field(default=8, description="codebooks D: residual levels, or chunks of a feature")
    size: int = Field(default=4096, ge=2, le=1 << 24, description="vectors K in the codebook of each depth")
    images: PositiveInt = Field(default=20_000, description="images sampled from the source; all of them if fewer")
    iterations: PositiveInt = Field(default=200, description="mini-batch k-means steps of each depth")
    minibatch: PositiveInt = Field(default=16_384, description="feature vectors in a k-means step")
    seed: NonNegativeInt = 0
    start_from: Path | None = Field(
        default=None, description="codebook folder to go on from, of the same method, depth, size and width"
    )
    max_pixels: PositiveInt = DEFAULT_MAX_PIXELS
    device: Device = "auto"
    batch_size: PositiveInt = Field(default=64, description="views per encoder call")
    decode_threads: PositiveInt | None = Field(
        default=None, description="default: the cores of the machine, at most 16"
    )
