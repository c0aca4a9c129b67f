"""From the bytes of a view to what a vision encoder is fed."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Normaliser:
    """`(pixel / 255 - mean) / std` per channel, in float32, on the encoder's device."""

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self._size = size
        self._device = device
        self._mean_C11 = torch.tensor(mean, dtype=torch.float32, device=device).view(3, 1, 1)
        self._std_C11 = torch.tensor(std, dtype=torch.float32, device=device).view(3, 1, 1)

    def __call__(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) RGB on any device -> float32 (B, 3, S, S); only bytes travel to the device."""
        size = self._size
        if views_BSSC.dtype != torch.uint8 or views_BSSC.shape[1:] != (size, size, 3):
            raise ValueError(
                f"views are uint8 (B, {size}, {size}, 3), not {views_BSSC.dtype} {tuple(views_BSSC.shape)}"
            )
        pixels = views_BSSC.to(self._device).permute(0, 3, 1, 2)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub_(self._mean_C11).div_(self._std_C11)
