"""Where pictures come from: the sources of a recipe, one model a kind. Imports no torch and no ray."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from tokenize_stage.stage_model import StageModel, StoragePath

SHARD_COLUMNS = frozenset(
    {"image_id", "sha256", "width", "height", "view_boxes", "file", "offset", "length", "codes", "features"}
)
"""Names that a carried column cannot have, since the shards' own columns have them."""

CarriedName = Annotated[str, Field(min_length=1)]


def _carried(names: tuple[str, ...]) -> tuple[str, ...]:
    if clash := sorted(SHARD_COLUMNS.intersection(names)):
        raise ValueError(f"{', '.join(clash)} is a column of the shards themselves")
    if len(set(names)) < len(names):
        raise ValueError("a name occurs twice")
    return names


def _some(path: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if not path:
        raise ValueError("names nothing")
    return path


class FolderSource(StageModel):
    """Every picture below a folder, in the order of its path."""

    kind: Literal["folder"] = "folder"
    path: StoragePath = Field(description="folder that is searched, with everything below it")


class LlavaSource(StageModel):
    """The pictures that a LLaVA JSON list or JSONL file (also `.zst`) refers to, in order of first appearance."""

    kind: Literal["llava"] = "llava"
    path: StoragePath = Field(description="JSON or JSONL file with the conversations")
    image_root: StoragePath = Field(description="folder that the `image` values are relative to")


class WebdatasetSource(StageModel):
    """The pictures in tar files (`.tar`, `.tar.zst`): members `.jpg .jpeg .png .webp`."""

    kind: Literal["webdataset"] = "webdataset"
    path: StoragePath | tuple[StoragePath, ...] = Field(
        description="folder, tar file, pattern such as `train-{000..127}.tar` or `**/*.tar.zst`, or a list of these"
    )
    carry: tuple[CarriedName, ...] = Field(
        default=(),
        description="suffixes of other members of a sample (`txt`, `json`, `cls`) whose text goes into the shards",
    )

    _path = field_validator("path")(_some)

    @field_validator("carry")
    @classmethod
    def _suffixes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _carried(tuple(name.lower().removeprefix(".") for name in names))


class ParquetSource(StageModel):
    """The pictures in, or named by, the rows of Parquet files; also Arrow files of Hugging Face `datasets`."""

    kind: Literal["parquet"] = "parquet"
    path: StoragePath | tuple[StoragePath, ...] = Field(
        description="folder, file, pattern such as `data/train-*.parquet`, or a list of these"
    )
    image_column: str = Field(
        default="image", description="column with bytes, with {bytes, path} as of Hugging Face data sets, or with paths"
    )
    image_root: StoragePath | None = Field(default=None, description="folder that a column of paths is relative to")
    id_column: str | None = Field(default=None, description="column with the image ids, default: they are `FILE!ROW`")
    carry: tuple[CarriedName, ...] = Field(default=(), description="columns that go into the shards as they are")

    _carry = field_validator("carry")(_carried)
    _path = field_validator("path")(_some)


SourceConfig = Annotated[FolderSource | LlavaSource | WebdatasetSource | ParquetSource, Field(discriminator="kind")]


def has_own_ids(source: SourceConfig) -> bool:
    """Whether images lie in containers of which their ids say nothing."""
    return isinstance(source, ParquetSource) and source.id_column is not None
