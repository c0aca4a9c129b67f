"""What decides the codebooks of a fit, told without fitting: whether a codebook folder is what a recipe asks for. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.geometry import geometry_keys
from manifests.storage import is_url
from tokenize_stage.codebook_folder import encoder_reference, read_description
from tokenize_stage.encoder_files import encoder_sha256, locate_encoder, normalisation

if TYPE_CHECKING:
    from tokenize_stage.config import CodebookConfig, SourceConfig


def fit_keys(config: CodebookConfig) -> dict[str, Any]:
    """Everything that was asked of a fit and changes its codebooks, for `manifests.fingerprint.differing_keys`.

    The encoder and the codebook it starts from count by content, the source by its place alone: a codebook is fitted on
    a sample of what the source held then, and images that come or go later make it neither wrong nor another one.
    Raises `InputError` when the encoder, or the codebook to start from, is not there.
    """
    files = locate_encoder(config.encoder.path)
    started = config.start_from
    itself = started is not None and started.resolve() == config.output.resolve()
    return {
        "source": _place(config.source, config.output),
        "geometry": geometry_keys(config.geometry.resolve(normalisation(files.folder).mean)),
        "encoder": {"sha256": encoder_sha256(files.folder), **config.encoder.model_dump(exclude={"path"})},
        "start_from": read_description(started).codebook_sha256 if started and not itself else None,
        **config.model_dump(
            mode="json",
            include={"method", "depth", "size", "images", "iterations", "minibatch", "seed", "max_pixels"},
        ),
    }


def _place(source: SourceConfig, output: Path) -> dict[str, Any]:
    """The source as configured, local paths told from the codebook's folder where both move together."""
    settings = source.model_dump(mode="json")
    for name in ("path", "image_root"):
        value = settings.get(name)
        if isinstance(value, list):
            settings[name] = [_reference(one, output) for one in value]
        elif value is not None:
            settings[name] = _reference(value, output)
    return settings


def _reference(place: str, output: Path) -> str:
    return place if is_url(place) else encoder_reference(output, Path(place))
