"""Tiny random AutoencoderKLs, saved the way diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LATENTS = 4
STRIDE = 2
SIZE = 28


def build(**changes: Any) -> Any:
    """A random VAE of two blocks: one latent for two by two pixels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "latent_channels": LATENTS,
        "norm_num_groups": 4,
        "sample_size": SIZE,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }
    return AutoencoderKL(**{**settings, **changes}).eval()


def save(vae: Any, folder: Path) -> Path:
    """Write a VAE."""
    vae.save_pretrained(folder)
    return folder
