"""Who a `features` producer is: an encoder, the layer whose output is stored, and the type it is computed and stored in."""

from __future__ import annotations

from manifests.schema import FeaturesSpec
from tokenize_stage.config import FeaturesTokenizer
from tokenize_stage.described import remembered_spec
from tokenize_stage.encoder_files import encoder_sha256, locate_encoder, normalisation
from tokenize_stage.identity import Identity


def describe(tokenizer: FeaturesTokenizer) -> Identity:
    """Raises `InputError` if the encoder is missing, lacks a tensor that the layer needs, or does not take the views."""
    settings = tokenizer.encoder
    files = locate_encoder(settings.path)
    sha256 = encoder_sha256(files.folder)

    def read() -> FeaturesSpec:
        from tokenize_stage.tokenizers.features import load_encoder, trained_size

        size = tokenizer.view_size or trained_size(files.folder)
        encoder = load_encoder(tokenizer, files.folder, size, device="cpu")
        pixels = normalisation(files.folder)
        return FeaturesSpec(
            kind=tokenizer.kind,
            origin=settings.path,
            weights_sha256=sha256,
            view_size=size,
            grid=encoder.grid,
            width=encoder.width,
            dtype=settings.dtype,
            settings={"layer": encoder.layer, "image_mean": list(pixels.mean), "image_std": list(pixels.std)},
        )

    spec = remembered_spec(
        tokenizer.kind,
        sha256,
        {"layer": settings.layer, "dtype": settings.dtype, "view_size": tokenizer.view_size},
        origin=settings.path,
        revision=files.revision,
        read=read,
        form=FeaturesSpec,
    )
    return Identity(spec, list)
