"""What a manifest is: one JSON document that names every committed shard and everything needed to use it.

The JSON Schema of `Manifest` is published as `manifests/manifest.schema.json`; `python -m manifests.schema`
writes it again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

SCHEMA_VERSION = 1
"""Version of the shard columns and of the manifest document, part of every fingerprint."""

MANIFEST_NAME = "manifest.json"
"""The newest manifest of an output folder; older ones are kept as `snapshots/DIGEST.json`."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RelativePath = Annotated[str, Field(min_length=1)]

Kind = Literal["codes", "features"]
"""What stands in the shards: ids of codebook vectors, or continuous vectors; also the name of their column."""

FeatureDtype = Literal["float32", "float16", "bfloat16"]


class Frozen(BaseModel):
    """Base of the contract's records: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ProducerSpec(Frozen):
    """What turns views into the values of a shard. One view of `view_size` x `view_size` pixels becomes
    `positions = grid[0] * grid[1]` positions.
    """

    kind: str
    origin: str = Field(description="path or hub id of the tokenizer, as the recipe gave it")
    revision: str | None = None
    weights_sha256: dict[str, Sha256] = Field(description="every file whose bytes decide a code")
    view_size: PositiveInt
    grid: tuple[PositiveInt, PositiveInt] = Field(description="(rows, columns) of positions in a view")

    @property
    def positions(self) -> int:
        return self.grid[0] * self.grid[1]


class TokenizerSpec(ProducerSpec):
    """What a visual tokenizer is and the shape of what it makes.

    A position has `depth` codes; the code at level d is an id in `0 .. codebook_sizes[d] - 1`.
    """

    codebook_sizes: tuple[PositiveInt, ...] = Field(description="K of each depth", min_length=1)
    code_dim: PositiveInt = Field(description="width of a codebook vector")
    residual: bool = Field(default=True, description="depth d quantises what depths before it left over")
    settings: dict[str, Any] = Field(default_factory=dict, description="kind-specific choices that decide a code")

    @property
    def depth(self) -> int:
        return len(self.codebook_sizes)

    @property
    def values(self) -> int:
        """Numbers stored for a position."""
        return self.depth


class FeaturesSpec(ProducerSpec):
    """What makes continuous features, and their shape: a position has `width` numbers of type `dtype`."""

    width: PositiveInt
    dtype: FeatureDtype = Field(description="of the stored numbers; bfloat16 as its 16 bits in a uint16")
    settings: dict[str, Any] = Field(default_factory=dict, description="kind-specific choices that decide a feature")

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """None at all: what is counted by code is empty for features."""
        return ()

    @property
    def values(self) -> int:
        """Numbers stored for a position."""
        return self.width


Producer = TokenizerSpec | FeaturesSpec


MOST_TILES = 64
"""Tiles of the largest grid pinpoint of `anyres`; published models have up to 36."""


class Geometry(Frozen):
    """How a decoded image becomes square uint8 views. See `manifests.geometry`."""

    mode: Literal["squash", "pad", "crop", "anyres"]
    size: PositiveInt = Field(description="edge of a view in pixels", le=4096)
    background: tuple[int, int, int] = Field(
        default=(127, 127, 127), description="RGB of the bars of `pad` and around the picture of `anyres`"
    )
    grid_pinpoints: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        default=(), description="(height, width) in pixels of the canvases of `anyres`, in order of preference"
    )

    @field_validator("background")
    @classmethod
    def _bytes(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if any(not 0 <= channel <= 255 for channel in value):
            raise ValueError("background channels are integers from 0 to 255")
        return value

    @model_validator(mode="after")
    def _pinpoints_are_grids_of_tiles(self) -> Geometry:
        if (self.mode == "anyres") != bool(self.grid_pinpoints):
            raise ValueError("grid_pinpoints belong to anyres, which needs at least one")
        for height, width in self.grid_pinpoints:
            if height % self.size or width % self.size:
                raise ValueError(f"the grid pinpoint [{height}, {width}] is not a multiple of size {self.size}")
            if height * width > MOST_TILES * self.size**2:
                raise ValueError(f"the grid pinpoint [{height}, {width}] makes more than {MOST_TILES} tiles")
        return self

    @model_serializer(mode="wrap")
    def _pinpoints_of_anyres_only(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The other modes are written as they were before there was anyres, byte for byte."""
        fields: dict[str, Any] = handler(self)
        if not self.grid_pinpoints:
            fields.pop("grid_pinpoints", None)
        return fields


class FileEntry(Frozen):
    """A file beside the manifest; `path` is relative to the manifest's folder."""

    path: RelativePath
    bytes: int = Field(ge=0)
    sha256: Sha256

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        if value.startswith("/") or "\\" in value or "\0" in value or ".." in value.split("/"):
            raise ValueError("a path in a manifest is relative and stays inside its folder")
        return value


class ShardEntry(FileEntry):
    """One committed shard: the unit it came from and its number of rows."""

    unit: str
    rows: int = Field(ge=0)


class TableEntry(FileEntry):
    """A Parquet side file (index, rejects) and its number of rows."""

    rows: int = Field(ge=0)


class SourceIdentity(Frozen):
    """Where the images came from."""

    kind: str
    location: str
    settings: dict[str, Any] = Field(default_factory=dict)


class DepthUsage(Frozen):
    """How one depth's codebook is used over all positions of all images."""

    used: int = Field(ge=0, description="codes that occur at least once")
    perplexity: float = Field(ge=0, description="exp of the entropy of the code distribution, at most K")


class Totals(Frozen):
    """The job's counts: `ok + rejected == images`, over distinct image references."""

    images: int = Field(ge=0)
    ok: int = Field(ge=0)
    rejected: int = Field(ge=0)
    source_errors: int = Field(ge=0, description="records or containers that named no readable image, counted apart")
    rejected_by_reason: dict[str, int] = Field(default_factory=dict)
    views: int = Field(ge=0)
    codes: int = Field(ge=0, description="0 in a set of features")

    @model_validator(mode="after")
    def _adds_up(self) -> Totals:
        if self.ok + self.rejected != self.images:
            raise ValueError(f"ok {self.ok} + rejected {self.rejected} is not images {self.images}")
        return self


class Numerics(Frozen):
    """What may flip a code whose margin is below rounding; recorded, not part of the fingerprint."""

    device: str
    torch: str
    dtype: str
    batch_size: PositiveInt


class Provenance(Frozen):
    """Who made this, with what; for people, compared with nothing."""

    created_at: str = Field(description="UTC, ISO 8601")
    command: list[str]
    versions: dict[str, str]
    numerics: list[Numerics] = Field(description="each distinct record among the units' workers")


_ONLY = {"codes": ("tokenizer", "codebook", "usage"), "features": ("features",)}
"""The keys that a manifest of one kind has, and a manifest of the other kind does not."""


class Manifest(Frozen):
    """The dataset: everything a reader may use, and nothing that is not committed.

    Kind `codes` has `tokenizer`, `codebook` and `usage`; kind `features` has `features` instead.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"kind": {"const": "features"}}, "required": ["kind"]},
            "then": {"required": list(_ONLY["features"])},
            "else": {"required": list(_ONLY["codes"])},
        }
    )

    format: Literal["asvr-manifest"] = "asvr-manifest"
    schema_version: Literal[1] = 1
    kind: Kind = "codes"
    fingerprint: Sha256
    fingerprint_keys: dict[str, Any] = Field(description="what the fingerprint is a hash of")
    tokenizer: TokenizerSpec | None = None
    features: FeaturesSpec | None = None
    geometry: Geometry
    codebook: FileEntry | None = Field(
        default=None, description="safetensors; tensors `depth_0` .. `depth_{D-1}`, float32 (K, code_dim)"
    )
    source: SourceIdentity
    shards: list[ShardEntry]
    shards_file: FileEntry | None = Field(default=None, description="zstd JSON list, used above 10,000 shards")
    index: TableEntry = Field(description="Parquet: one row per ok image, in shard order")
    rejects: TableEntry = Field(description="Parquet: one row per rejected image")
    totals: Totals
    usage: list[DepthUsage] | None = None
    provenance: Provenance

    @property
    def producer(self) -> Producer:
        """What made the shards, whichever kind they are."""
        return cast("Producer", self.tokenizer or self.features)  # one of them is there, see the validator below

    @model_validator(mode="after")
    def _has_the_keys_of_its_kind(self) -> Manifest:
        for kind, names in _ONLY.items():
            for name in names:
                if (getattr(self, name) is None) == (kind == self.kind):
                    raise ValueError(f"a manifest of {self.kind} {'lacks' if kind == self.kind else 'has'} {name}")
        return self

    @model_serializer(mode="wrap")
    def _without_the_other_kinds_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Manifests of codes are written as they were before there were features, byte for byte."""
        other = _ONLY["features" if self.kind == "codes" else "codes"]
        return {name: value for name, value in handler(self).items() if name not in other}


def published_schema() -> str:
    """The JSON Schema of `Manifest` as the text of `manifest.schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("manifest.schema.json").write_text(published_schema())
