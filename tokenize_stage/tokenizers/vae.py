"""The `vae` producer: mean and log-variance of the posterior of an `AutoencoderKL`, side by side at each latent position.

Nothing is sampled, so a trainer may sample as it likes: `mean + exp(log-variance / 2) * noise`. The VAE is diffusers' own,
an optional package that is imported here only; the weights are read strictly, and the decoder's half is not read at all.

Shape legend: B views, S edge of a view, h w the latent grid, P = h * w positions, C latent channels.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from manifests.errors import EnvironmentProblem, InputError
from manifests.schema import FeaturesSpec
from tokenize_stage.checkpoints import State, check_shapes, fill, read_tensor_files, shapes_of, take
from tokenize_stage.config import ComputeDtype, Device, VaeTokenizer
from tokenize_stage.encoder import full_precision, resolve_device
from tokenize_stage.identities.vae import MEAN_AND_STD, VaeFiles, locate
from tokenize_stage.pixels import Normaliser
from tokenize_stage.tokenizers.base import Tokenizer
from tokenize_stage.tokenizers.continuous import ContinuousTokenizer

_IGNORABLE = {"decoder": r"(decoder|post_quant_conv)\..+"}
_OLD_ATTENTION = re.compile(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load(config: VaeTokenizer, spec: FeaturesSpec, *, dtype: ComputeDtype, device: Device) -> Tokenizer:
    """The producer of `spec`, always in float32."""
    if dtype != "float32":
        raise ValueError(f"a VAE computes in float32, not {dtype}")
    return ContinuousTokenizer(spec, PosteriorEncoder(locate(config), spec.view_size, device))


def check_tensors(files: VaeFiles) -> None:
    """`InputError` unless the weights are those of the configuration; reads names and shapes only."""
    check_shapes(_read(files), shapes_of(_build(files), ""), _IGNORABLE, where=files.where)


class PosteriorEncoder:
    """The encoder's half of an AutoencoderKL. See `tokenizers.residual.Encoder`."""

    def __init__(self, files: VaeFiles, view_size: int, device: Device = "auto") -> None:
        self.device = resolve_device(device)
        self._vae = _build(files)
        fill(self._vae, take(_read(files), shapes_of(self._vae, ""), _IGNORABLE, where=files.where), "")
        self._vae.to(self.device)
        self._normalise = Normaliser(view_size, MEAN_AND_STD, MEAN_AND_STD, self.device)

    @torch.inference_mode()
    def features(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) on any device -> float32 (B, P, 2C) on `device`: C means, then C log-variances.

        The log-variance is that of diffusers' `latent_dist`, which keeps it between -30 and 20.
        """
        with full_precision(self.device):
            posterior = self._vae.encode(self._normalise(views_BSSC)).latent_dist
        values_BChw = torch.cat([posterior.mean, posterior.logvar], dim=1)
        return values_BChw.flatten(2).transpose(1, 2).contiguous()


def _build(files: VaeFiles) -> Any:
    """The VAE without its decoder, on the meta device."""
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "diffusers":
            raise
        raise EnvironmentProblem("the package diffusers is not installed; run: pip install 'asvr[vae]'") from error
    try:
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(files.settings.values)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{files.settings.where} is not the configuration of an AutoencoderKL ({reason}): "
                         "restore it from the model's origin") from error  # fmt: skip
    vae.decoder = vae.post_quant_conv = None
    return vae


def _read(files: VaeFiles) -> State:
    """The tensors, attention under the names that diffusers has used since 2023."""
    return {_new_name(name): tensor for name, tensor in read_tensor_files([files.weights]).items()}


def _new_name(name: str) -> str:
    old = _OLD_ATTENTION.fullmatch(name)
    return f"{old[1]}.{_NEW_NAMES[old[2]]}.{old[3]}" if old else name
