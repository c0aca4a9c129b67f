"""Who a `vae` producer is: the folder of a diffusers `AutoencoderKL`, of which only the encoder's half is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from manifests.errors import InputError
from manifests.hashes import file_sha256
from manifests.schema import FeaturesSpec
from tokenize_stage.config import VaeTokenizer
from tokenize_stage.described import remembered_spec
from tokenize_stage.encoder_files import CONFIG
from tokenize_stage.hub import Located, locate_folder
from tokenize_stage.identity import Identity
from tokenize_stage.json_config import Settings, read_settings

WEIGHTS = "diffusion_pytorch_model.safetensors"
MEAN_AND_STD = (0.5, 0.5, 0.5)
"""Pixels from -1 to 1."""

_RECORDED = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""How a diffusion model would rescale a latent. They are recorded, not applied."""


@dataclass(frozen=True)
class VaeFiles:
    """A configured VAE, its files found and its configuration read."""

    folder: Located
    settings: Settings
    latents: int
    stride: int

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.folder.path / WEIGHTS

    @property
    def where(self) -> str:
        """The VAE, for messages."""
        return f"the VAE {self.folder.path}"


def describe(tokenizer: VaeTokenizer) -> Identity:
    """Raises `InputError` if the folder is not that of an AutoencoderKL or lacks a tensor of its encoder."""
    files = locate(tokenizer)
    size = tokenizer.view_size or files.settings.count("sample_size")
    if size % files.stride:
        raise InputError(
            f"{files.where} makes one latent of {files.stride} x {files.stride} pixels, which does not divide views of "
            f"{size}: set tokenizer.view_size and geometry.size to a multiple of {files.stride}"
        )
    sha256 = {CONFIG: file_sha256(files.folder.path / CONFIG), WEIGHTS: file_sha256(files.weights)}

    def read() -> FeaturesSpec:
        from tokenize_stage.tokenizers.vae import check_tensors

        check_tensors(files)
        edge = size // files.stride
        return FeaturesSpec(
            kind=tokenizer.kind,
            origin=tokenizer.path,
            weights_sha256=sha256,
            view_size=size,
            grid=(edge, edge),
            width=2 * files.latents,
            dtype="float32",
            settings={
                "values": "posterior mean, then log-variance",
                "latent_channels": files.latents,
                "image_mean": list(MEAN_AND_STD),
                "image_std": list(MEAN_AND_STD),
                **{name: files.settings.values.get(name) for name in _RECORDED},
            },
        )

    spec = remembered_spec(
        tokenizer.kind,
        sha256,
        {"view_size": size},
        origin=tokenizer.path,
        revision=files.folder.revision,
        read=read,
        form=FeaturesSpec,
    )
    return Identity(spec, list)


def locate(tokenizer: VaeTokenizer) -> VaeFiles:
    """Find the files and read what the configuration says of the latents."""
    folder = locate_folder(tokenizer.path, [CONFIG, WEIGHTS])
    for name in (CONFIG, WEIGHTS):
        if not (folder.path / name).is_file():
            raise InputError(
                f"{tokenizer.path} has no {name}: give the folder of an AutoencoderKL that diffusers saved "
                "(of a whole pipeline its folder vae)"
            )
    settings = read_settings(folder.path / CONFIG)
    if (kind := settings.text("_class_name")) != "AutoencoderKL":
        raise InputError(f"{settings.where} is of a {kind}: give the folder of an AutoencoderKL")
    if settings.count("in_channels") != 3:
        raise settings.wrong("in_channels", "the 3 channels of a picture")
    blocks = settings.values.get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 12:
        raise settings.wrong("block_out_channels", "a list of 1 to 12 widths")
    # Every block but the last halves the picture.
    return VaeFiles(folder, settings, settings.count("latent_channels"), 2 ** (len(blocks) - 1))
