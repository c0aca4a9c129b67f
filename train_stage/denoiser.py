"""ROSS's denoiser: a small diffusion transformer whose every position is told its own hidden state.

Formulas follow the released ROSS code (ross/model/multimodal_denoiser), whose numbers the tests reproduce. Shapes:
R rows (views times noise levels), P positions, H width of the language model, W width of the denoiser, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_stage.flops import Forward, linear_elements

STEPS = 1000
"""Of the noise schedule."""

TIME_WIDTH = 256
FFN_RATIO = 4


def cosine_schedule(steps: int = STEPS) -> Tensor:
    """float64 (steps,): the share of signal alpha-bar that is left after each step of the cosine schedule.

    beta_i = min(1 - f((i+1)/steps) / f(i/steps), 0.999) with f(t) = cos^2((t + 0.008) / 1.008 * pi / 2), and
    alpha-bar_i = product of (1 - beta_j) over j <= i (arXiv 2102.09672, Eq. 17).
    """
    f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    betas = torch.tensor([min(1 - f[i + 1] / f[i], 0.999) for i in range(steps)], dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


def add_noise(clean: Tensor, noise: Tensor, alpha_bar_R: Tensor) -> Tensor:
    """sqrt(alpha_bar) * clean + sqrt(1 - alpha_bar) * noise for (R, P, C); alpha_bar float64 (R,)."""
    signal = alpha_bar_R.sqrt().to(clean.dtype).view(-1, 1, 1)
    rest = (1 - alpha_bar_R).sqrt().to(clean.dtype).view(-1, 1, 1)
    return signal * clean + rest * noise


def time_frequencies(t_R: Tensor) -> Tensor:
    """float32 (R, 256): cosines, then sines, of the step times 128 frequencies from 1 down to nearly 1/10000."""
    half = TIME_WIDTH // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t_R.device) / half)
    angles = t_R[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(grid: tuple[int, int], width: int) -> Tensor:
    """float32 (P, W): sines and cosines of the column in the first half of the channels, of the row in the second."""
    rows, columns = grid
    omega = 1 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def table(places: Tensor) -> Tensor:
        angles = places.flatten().double()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([table(column), table(row)], dim=1).float()


class DenoiserBlock(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the position's own condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, FFN_RATIO * width)
        self.down = nn.Linear(FFN_RATIO * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_RPW: Tensor, condition_RPW: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition_RPW)).chunk(6, dim=-1)
        x_RPW = x_RPW + gate1 * self._attention(modulated(x_RPW, shift1, scale1))
        inner = F.gelu(self.up(modulated(x_RPW, shift2, scale2)), approximate="tanh")
        return x_RPW + gate2 * self.down(inner)

    def _attention(self, x_RPW: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_RPW).chunk(3, dim=-1)
        )
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def modulated(x_RPW: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift of each position."""
    return F.layer_norm(x_RPW, x_RPW.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Denoiser(nn.Module):
    """Predicts the noise in (R, P, C), told the step and the hidden state of every position.

    Starts as DiT does: modulations and last layer zero, so that the first prediction is 0 and the first loss 1.
    """

    positions: Tensor

    def __init__(
        self, hidden_size: int, channels: int, grid: tuple[int, int], width: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        self.patch_in = nn.Linear(channels, width)
        self.time_in = nn.Sequential(nn.Linear(TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))
        self.hidden_in = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, width))
        self.blocks = nn.ModuleList(DenoiserBlock(width, heads) for _ in range(layers))
        self.last_modulation = nn.Linear(width, 2 * width)
        self.noise_out = nn.Linear(width, channels)
        self.register_buffer("positions", position_table(grid, width), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(".weight") and name.startswith(("time_in", "hidden_in")):
                nn.init.normal_(parameter, std=0.02)
            elif "modulation" in name or name.startswith("noise_out"):
                nn.init.zeros_(parameter)

    def forward(self, noisy_RPC: Tensor, t_R: Tensor, hidden_RPH: Tensor) -> Tensor:
        """The predicted noise, float32 (R, P, C)."""
        dtype = self.patch_in.weight.dtype
        x_RPW = self.patch_in(noisy_RPC.to(dtype)) + self.positions.to(dtype)
        told = self.hidden_in(F.layer_norm(hidden_RPH.float(), hidden_RPH.shape[-1:], eps=1e-5).to(dtype))
        condition_RPW = self.time_in(time_frequencies(t_R).to(dtype))[:, None] + told
        for block in self.blocks:
            x_RPW = block(x_RPW, condition_RPW)
        shift, scale = self.last_modulation(F.silu(condition_RPW)).chunk(2, dim=-1)
        return self.noise_out(modulated(x_RPW, shift, scale)).float()

    def forward_flops(self, positions: int) -> Forward:
        """FLOPs of one position of a row of `positions`; the noisy latents and the step carry no gradient."""
        width = self.patch_in.out_features
        step_in, step_mid = linear_elements(self.time_in[0]), linear_elements(self.time_in[2])  # once a row
        latents = linear_elements(self.patch_in)
        each = linear_elements(self) - step_in - step_mid - latents
        return Forward(
            weights=2.0 * (each + step_mid / positions),
            first=2.0 * (latents + step_in / positions),
            pairs=4.0 * len(self.blocks) * positions * width,
        )
