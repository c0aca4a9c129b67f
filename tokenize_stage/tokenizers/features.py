"""The `features` producer: hidden states of a vision encoder, stored as they are."""

from __future__ import annotations

from pathlib import Path

from manifests.errors import InputError
from manifests.schema import FeaturesSpec
from tokenize_stage.config import ComputeDtype, Device, FeaturesTokenizer
from tokenize_stage.encoder import VisionEncoder, vision_config
from tokenize_stage.encoder_files import locate_encoder, normalisation
from tokenize_stage.tokenizers.base import Tokenizer
from tokenize_stage.tokenizers.continuous import ContinuousTokenizer


def load(config: FeaturesTokenizer, spec: FeaturesSpec, *, dtype: ComputeDtype, device: Device) -> Tokenizer:
    """The producer of `spec`. `dtype` is that of the encoder: what is computed is what is stored."""
    if dtype != spec.dtype:
        raise ValueError(f"features in {spec.dtype} are not computed in {dtype}")
    folder = locate_encoder(config.encoder.path, spec.revision).folder
    return ContinuousTokenizer(spec, load_encoder(config, folder, spec.view_size, device=device))


def load_encoder(config: FeaturesTokenizer, folder: Path, view_size: int, *, device: Device) -> VisionEncoder:
    """The encoder of a configured producer, from its folder."""
    return VisionEncoder(
        folder,
        layer=config.encoder.layer,
        view_size=view_size,
        normalisation=normalisation(folder),
        dtype=config.encoder.dtype,
        device=device,
    )


def trained_size(folder: Path) -> int:
    """The edge of the pictures that the encoder in `folder` was trained on, as its configuration says."""
    size = getattr(vision_config(folder), "image_size", None)
    edges = {*size} if isinstance(size, list | tuple) else {size}
    edge = edges.pop()
    if edges or not isinstance(edge, int):
        raise InputError(f"the encoder {folder} does not say which square size it takes: set tokenizer.view_size")
    return edge
