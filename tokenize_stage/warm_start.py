"""Codebooks that a fit goes on from, instead of from points drawn out of its sample. Imports no torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from manifests.errors import InputError
from tokenize_stage.codebook_folder import read_codebooks, read_description

if TYPE_CHECKING:
    from tokenize_stage.config import CodebookConfig

_log = logging.getLogger(__name__)


class StartingPoint(NamedTuple):
    """Codebooks to go on from, and the hash of their file."""

    codebooks: list[npt.NDArray[np.float32]]
    sha256: str


def read_start(folder: Path, config: CodebookConfig, code_dim: int, encoder_sha256: dict[str, str]) -> StartingPoint:
    """The codebooks of `folder`. `InputError` unless they are of the shape that `config` is to fit."""
    description = read_description(folder)
    found = {
        "method": description.method,
        "depth": len(description.codebook_sizes),
        "size": max(description.codebook_sizes),
        "width": description.code_dim,
    }
    wanted = {"method": config.method, "depth": config.depth, "size": config.size, "width": code_dim}
    if differing := [key for key in wanted if wanted[key] != found[key]]:
        was = ", ".join(f"{key} {found[key]}" for key in differing)
        now = ", ".join(f"{key} {wanted[key]}" for key in differing)
        raise InputError(
            f"start_from {folder} has codebooks of {was}, not {now}: make them agree or leave start_from out"
        )
    if description.encoder.sha256 != encoder_sha256:
        _log.warning("the codebooks of %s were fitted on other encoder files: they are only a first guess here", folder)
    return StartingPoint(read_codebooks(folder, description), description.codebook_sha256)
