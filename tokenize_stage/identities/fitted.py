"""Who a `fitted` tokenizer is: the codebook folder and the encoder that it names."""

from __future__ import annotations

from functools import partial

from manifests.errors import InputError
from manifests.schema import TokenizerSpec
from tokenize_stage.codebook_folder import TENSORS, codebook_file, encoder_path, read_codebooks, read_description
from tokenize_stage.config import FittedTokenizer
from tokenize_stage.encoder_files import encoder_sha256, locate_encoder
from tokenize_stage.identity import Identity


def describe(tokenizer: FittedTokenizer) -> Identity:
    """Raises `InputError` if the codebook folder is invalid or was fitted on another encoder than is there now."""
    folder = tokenizer.path
    description = read_description(folder)
    codebook_file(folder, description)
    encoder = locate_encoder(encoder_path(folder, description.encoder), description.encoder.revision)
    sha256 = encoder_sha256(encoder.folder)
    if sha256 != description.encoder.sha256:
        names = sorted(
            name for name in {*sha256, *description.encoder.sha256}
            if sha256.get(name) != description.encoder.sha256.get(name)
        )  # fmt: skip
        raise InputError(
            f"the encoder {encoder.folder} is not the one the codebook {folder} was fitted on "
            f"({', '.join(names)} differ): restore the encoder or fit the codebook again"
        )
    spec = TokenizerSpec(
        kind=tokenizer.kind,
        origin=str(folder),
        revision=description.encoder.revision,
        weights_sha256={TENSORS: description.codebook_sha256}
        | {f"encoder/{name}": value for name, value in sha256.items()},
        view_size=description.view_size,
        grid=description.grid,
        codebook_sizes=description.codebook_sizes,
        code_dim=description.code_dim,
        residual=description.method == "residual",
        settings={
            "layer": description.encoder.layer,
            "image_mean": list(description.image_mean),
            "image_std": list(description.image_std),
        },
    )
    return Identity(spec, partial(read_codebooks, folder, description))
