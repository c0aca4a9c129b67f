"""What a tokenize job and a codebook fit are told: the part of a recipe this stage owns. Imports no torch and no ray.

Paths are used as they stand; whoever reads a recipe resolves them against the recipe file first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import (
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
from manifests.schema import Geometry
from tokenize_stage.source_config import FolderSource, LlavaSource, ParquetSource, SourceConfig, WebdatasetSource
from tokenize_stage.stage_model import StageModel, StoragePath
from tokenize_stage.tokenizer_config import (
    ComputeDtype,
    DualTokenTokenizer,
    EncoderConfig,
    FeaturesTokenizer,
    FittedTokenizer,
    HfVqTokenizer,
    QlipTokenizer,
    TaTokTokenizer,
    TokenizerConfig,
    UniTokTokenizer,
    VaeTokenizer,
    VilaUTokenizer,
    ViTaminConfig,
)

__all__ = [
    "CodebookConfig",
    "ComputeDtype",
    "Device",
    "DualTokenTokenizer",
    "EncoderConfig",
    "FeaturesTokenizer",
    "FittedTokenizer",
    "FolderSource",
    "GeometryConfig",
    "HfVqTokenizer",
    "LlavaSource",
    "ParquetSource",
    "QlipTokenizer",
    "RayConfig",
    "SourceConfig",
    "StageModel",
    "TaTokTokenizer",
    "TokenSetConfig",
    "TokenizerConfig",
    "UniTokTokenizer",
    "VaeTokenizer",
    "ViTaminConfig",
    "VilaUTokenizer",
    "WebdatasetSource",
]

LLAVA_NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""(rows, columns) of tiles in LLaVA-NeXT's `image_grid_pinpoints`, in its order, which decides between equals."""

Device = Literal["auto", "cpu", "cuda"]


class GeometryConfig(StageModel):
    """How a decoded image becomes views: `manifests.schema.Geometry`, with what may be left open."""

    mode: Literal["squash", "pad", "crop", "anyres"]
    size: PositiveInt = Field(description="edge of a view in pixels", le=4096)
    background: tuple[int, int, int] | None = Field(
        default=None,
        description="RGB of the letterbox bars of `pad`, default: int(255 x the encoder's mean), as LLaVA; "
        "and around the picture of `anyres`, default: black, as LLaVA-NeXT",
    )
    grid_pinpoints: tuple[tuple[PositiveInt, PositiveInt], ...] | None = Field(
        default=None,
        min_length=1,
        description="[height, width] in pixels of the canvases that `anyres` chooses from, multiples of `size`; "
        "default: LLaVA-NeXT's, [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]] times `size`",
    )

    def resolve(self, image_mean: Sequence[float] = (0.5, 0.5, 0.5)) -> Geometry:
        """The geometry with its colour and its pinpoints decided."""
        background, pinpoints = self.background, self.grid_pinpoints or ()
        if background is None:
            background = (0, 0, 0) if self.mode == "anyres" else background_from_mean(image_mean)
        if self.mode == "anyres" and not pinpoints:
            pinpoints = tuple((down * self.size, across * self.size) for down, across in LLAVA_NEXT_GRIDS)
        return Geometry(mode=self.mode, size=self.size, background=background, grid_pinpoints=pinpoints)

    @model_validator(mode="after")
    def _resolves(self) -> GeometryConfig:
        self.resolve()
        return self

    @field_validator("background")
    @classmethod
    def _bytes(cls, value: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        if value is not None and any(not 0 <= channel <= 255 for channel in value):
            raise ValueError("background channels are integers from 0 to 255")
        return value


class RayConfig(StageModel):
    """How many workers of what size `engine: ray` asks the cluster for."""

    address: str = Field(
        default="auto",
        pattern=r"^(auto|local|ray://[^/\s]+:\d+)$",
        description="`auto`: the running cluster, else a new local one; `local`: a new local one; or `ray://HOST:PORT`",
    )
    num_workers: PositiveInt | None = Field(
        default=None,
        description="workers; those without room begin when a node joins, and make an autoscaler add one. "
        "Default: as many as there is room for at any time, one per GPU, without GPUs one per node",
    )
    cpus_per_worker: PositiveFloat = Field(default=1.0, description="cores reserved for a worker")
    gpus_per_worker: NonNegativeFloat | None = Field(
        default=None, description="default: 1 if the cluster has GPUs when the job starts"
    )
    memory_per_worker: PositiveFloat | None = Field(
        default=None, description="GiB of memory reserved for a worker, default: nothing is reserved"
    )
    decode: Literal["local", "cluster"] = Field(
        default="local",
        description="`local`: a worker decodes its images in threads; `cluster`: in Ray tasks of one core each on any node",
    )
    wait_for_nodes: NonNegativeFloat = Field(
        default=0, description="seconds without a node that has room for a worker after which the job gives up"
    )


class TokenSetConfig(StageModel):
    """One named token set of a recipe: a source, a geometry, a tokenizer and the output folder."""

    source: SourceConfig
    geometry: GeometryConfig
    tokenizer: TokenizerConfig
    output: StoragePath
    engine: Literal["local", "ray"] = "local"
    ray: RayConfig = RayConfig()
    unit_size: PositiveInt = Field(default=4096, description="images per unit, which is committed at once")
    max_reject_rate: float = Field(default=0.01, ge=0, le=1, description="share of the images that may be rejects")
    max_consecutive_rejects: PositiveInt | None = Field(
        default=1000, description="so many rejects in a row, in the order of the source, stop the job; null: never"
    )
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
    decode_threads: PositiveInt | None = Field(
        default=None,
        description="images a worker decodes at a time, default: the cores of its machine, at most 16; "
        "with ray.decode: cluster, Ray tasks at a time, default 8",
    )

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
