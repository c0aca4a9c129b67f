"""The `fitted` tokenizer: a frozen vision encoder and the codebooks that `asvr fit-codebook` learnt on it."""

from __future__ import annotations

from manifests.errors import InputError
from manifests.schema import TokenizerSpec
from tokenize_stage.codebook_folder import encoder_path, read_codebooks, read_description
from tokenize_stage.config import ComputeDtype, Device, FittedTokenizer
from tokenize_stage.encoder import VisionEncoder
from tokenize_stage.encoder_files import Normalisation, locate_encoder
from tokenize_stage.tokenizers.base import Tokenizer
from tokenize_stage.tokenizers.product import ProductTokenizer
from tokenize_stage.tokenizers.residual import ResidualTokenizer


def load(config: FittedTokenizer, spec: TokenizerSpec, *, dtype: ComputeDtype, device: Device) -> Tokenizer:
    """The tokenizer of a codebook folder. `InputError` if codebook and encoder do not fit each other."""
    folder = config.path
    description = read_description(folder)
    encoder = VisionEncoder(
        locate_encoder(encoder_path(folder, description.encoder), spec.revision).folder,
        layer=description.encoder.layer,
        view_size=spec.view_size,
        normalisation=Normalisation(description.image_mean, description.image_std),
        dtype=dtype,
        device=device,
    )
    if encoder.grid != spec.grid or encoder.width != description.width:
        raise InputError(
            f"the encoder of codebook {folder} makes a grid of {encoder.grid} features {encoder.width} wide, but the "
            f"codebook is for {spec.grid} and {description.width}: fit the codebook again"
        )
    kind = ResidualTokenizer if spec.residual else ProductTokenizer
    return kind(spec, encoder, read_codebooks(folder, description))
