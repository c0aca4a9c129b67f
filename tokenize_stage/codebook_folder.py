"""What `asvr fit-codebook` leaves behind: `codebook.json`, `codebook.safetensors`. Imports no torch.

The folder is untrusted input: whatever reads it goes through `read_description` and `read_codebooks`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError

from manifests.codebook import decode_codebooks, encode_codebooks
from manifests.errors import InputError, VerificationFailed
from manifests.hashes import file_sha256
from manifests.schema import Frozen, Geometry, Sha256
from manifests.storage import Store

DESCRIPTION = "codebook.json"
TENSORS = "codebook.safetensors"

Channel = Annotated[float, Field(allow_inf_nan=False)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DepthReport(Frozen):
    """How one depth's codebook fits the sample it was learnt from."""

    used: int = Field(ge=0, description="codes that occur at least once")
    perplexity: float = Field(ge=0, description="exp of the entropy of the code distribution, at most K")
    relative_error: FiniteFloat = Field(
        ge=0,
        description="sum |x - reconstruction|^2 / sum |x - mean|^2 with the codes of this and earlier depths; in a "
        "product the chunks of later depths stand at their mean",
    )


class FitReport(Frozen):
    """What `asvr fit-codebook` measured."""

    images: NonNegativeInt = Field(description="images that gave features")
    rejected: NonNegativeInt = Field(description="images of the sample that could not be decoded")
    positions: NonNegativeInt = Field(description="positions with picture content seen; padding cells are left out")
    sampled: NonNegativeInt = Field(description="positions the codebooks were fitted to, drawn from those seen")
    seconds: float = Field(ge=0)
    depths: tuple[DepthReport, ...]


class EncoderRecord(Frozen):
    """The encoder a codebook was fitted on."""

    path: str = Field(min_length=1, description="folder, relative to the codebook's folder or absolute; or a hub id")
    revision: str | None = Field(default=None, description="commit, exactly when `path` is a hub id")
    layer: NonNegativeInt = Field(description="index into hidden_states, counted from 0 = embeddings")
    sha256: dict[str, Sha256] = Field(min_length=1, description="of each file that decides a feature")


class CodebookDescription(Frozen):
    """`codebook.json`."""

    format: Literal["asvr-codebook"] = "asvr-codebook"
    schema_version: Literal[1] = 1
    kind: Literal["fitted"] = "fitted"
    method: Literal["residual", "product"] = Field(
        default="residual", description="depths quantise what is left over, or each its own chunk of the feature"
    )
    encoder: EncoderRecord
    image_mean: tuple[Channel, Channel, Channel]
    image_std: tuple[Scale, Scale, Scale]
    view_size: PositiveInt
    grid: tuple[PositiveInt, PositiveInt] = Field(description="(rows, columns) of positions in a view")
    codebook_sizes: tuple[PositiveInt, ...] = Field(min_length=1, description="K of each depth")
    code_dim: PositiveInt = Field(description="width of a codebook vector: of a feature, or of its chunk")
    codebook_sha256: Sha256
    started_from: Sha256 | None = Field(default=None, description="codebook_sha256 of the one the fit went on from")
    fit_keys: dict[str, Any] | None = Field(
        default=None, description="what was asked of the fit, see `fit_keys`; None in a folder of an earlier version"
    )
    geometry: Geometry = Field(description="of the views it was fitted on")
    dtype: Literal["float32", "bfloat16"] = Field(description="arithmetic of the encoder during the fit")
    seed: NonNegativeInt
    report: FitReport

    @property
    def width(self) -> int:
        """Of the features that are quantised."""
        return self.code_dim * (len(self.codebook_sizes) if self.method == "product" else 1)


def read_description(folder: Path) -> CodebookDescription:
    """`codebook.json`, validated. `InputError` names the first thing wrong with it."""
    file = folder / DESCRIPTION
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"{folder} is not a codebook folder ({DESCRIPTION} cannot be read): run asvr fit-codebook first"
        ) from error
    try:
        return CodebookDescription.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise InputError(f"{file} is not valid ({where}: {first['msg']}): fit the codebook again") from error


def codebook_file(folder: Path, description: CodebookDescription) -> Path:
    """The tensor file, after its hash was compared with the description's."""
    file = folder / TENSORS
    if not file.is_file():
        raise InputError(f"the codebook folder {folder} has no {TENSORS}: fit the codebook again")
    if file_sha256(file) != description.codebook_sha256:
        raise InputError(f"{file} is not the file that {DESCRIPTION} describes: fit the codebook again")
    return file


def read_codebooks(folder: Path, description: CodebookDescription) -> list[npt.NDArray[np.float32]]:
    """D float32 arrays (K, code_dim): names, shapes, dtype, finiteness and hash checked."""
    file = codebook_file(folder, description)
    try:
        return decode_codebooks(file.read_bytes(), description.codebook_sizes, description.code_dim, str(file))
    except VerificationFailed as error:
        raise InputError(
            f"{file} does not hold finite float32 tensors as {DESCRIPTION} describes them: fit the codebook again"
        ) from error


def write_codebooks(folder: Path, codebooks: list[npt.NDArray[np.float32]]) -> str:
    """Write the tensor file and return its sha256."""
    Store.open(folder).write(TENSORS, encode_codebooks(codebooks))
    return file_sha256(folder / TENSORS)


def write_description(folder: Path, description: CodebookDescription) -> None:
    """Write `codebook.json`; done last, it makes the folder a codebook."""
    text = json.dumps(description.model_dump(mode="json"), indent=2) + "\n"
    Store.open(folder).write(DESCRIPTION, text.encode())


def encoder_reference(folder: Path, encoder: Path) -> str:
    """How a codebook folder names a local encoder: relative if both lie below one parent and so move together."""
    folder, encoder = folder.resolve(), encoder.resolve()
    if encoder.is_relative_to(folder.parent):
        return os.path.relpath(encoder, folder)
    return str(encoder)


def encoder_path(folder: Path, encoder: EncoderRecord) -> str:
    """The path or hub id to give to `locate_encoder`."""
    return encoder.path if encoder.revision else str(folder / encoder.path)
