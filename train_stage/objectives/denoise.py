"""ROSS (arXiv 2410.09575): the hidden states of a view tell a denoiser what the noisy latents of that view show.

Shapes: V views, P positions of the tower's grid, Q of the targets' own, R rows (views times noise levels), C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from manifests.errors import InputError
from manifests.schema import FeaturesSpec
from train_stage import objective_config as config
from train_stage.batch import NO_TOKEN, Batch
from train_stage.denoiser import STEPS, Denoiser, add_noise, cosine_schedule
from train_stage.flops import Forward
from train_stage.losses import CHUNK, TermSums, sum_over_chunks
from train_stage.objectives.base import NOTHING, Objective, Surroundings, Target

VAE = "vae"
"""The kind of features that are a posterior: means, then log-variances."""


def build(settings: config.DenoiseObjective, target: Target, around: Surroundings) -> DenoiseObjective:
    """The term of a phase; InputError unless the features' grid is the tower's or a whole multiple of it."""
    spec = target.spec
    if not isinstance(spec, FeaturesSpec):
        raise InputError(f"{target.where} holds codes, not features: give objective {settings.name} a set of features")
    window = spec.grid[0] // around.grid[0]
    if window < 1 or spec.grid != (window * around.grid[0], window * around.grid[1]):
        raise InputError(
            f"{target.where} has {spec.grid[0]}x{spec.grid[1]} positions a view, which is no multiple of the vision "
            f"tower's {around.grid[0]}x{around.grid[1]}: tokenize with a view_size that gives one (ROSS: twice it)"
        )
    return DenoiseObjective(settings, around.hidden_size, around.grid, spec)


def latents(stored: Tensor, spec: FeaturesSpec, noise: Tensor | None) -> Tensor:
    """float32 (V, Q, C) of what a denoiser is to find, from features as stored (V, Q, W).

    A VAE's posterior (mean, log-variance): (mean + exp(log-variance / 2) * noise - shift_factor) * scaling_factor, or
    the mean's where `noise` (V, Q, C) is None. An encoder's features: each position brought to mean 0 and variance 1,
    which the noise schedule takes for granted.
    """
    if spec.kind != VAE:
        return F.layer_norm(stored.float(), stored.shape[-1:])
    mean, log_variance = stored.float().chunk(2, dim=-1)
    if noise is not None:
        mean = mean + (log_variance / 2).exp() * noise
    return (mean - (spec.settings.get("shift_factor") or 0.0)) * (spec.settings.get("scaling_factor") or 1.0)


def stacked(values: Tensor, grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
    """(V, Q, C) on `target_grid` as (V, P, C*s*s) on `grid`: the s x s window below a position, channel by channel."""
    s = target_grid[0] // grid[0]
    views, _, channels = values.shape
    windows = values.view(views, grid[0], s, grid[1], s, channels)
    return windows.permute(0, 1, 3, 5, 2, 4).reshape(views, grid[0] * grid[1], channels * s * s)


class DenoiseObjective(Objective):
    """Mean squared error of the predicted noise over channels and noise levels, summed over positions.

    Positions that are not scored (padding cells) are context like any other; a view that was cut is not scored at all.
    """

    alpha_bar: Tensor

    def __init__(
        self,
        settings: config.DenoiseObjective,
        hidden_size: int,
        grid: tuple[int, int],
        spec: FeaturesSpec,
        *,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        self.settings, self.spec, self.grid = settings, spec, grid
        self.weight = settings.weight
        self.rows_at_once = max(1, chunk // (grid[0] * grid[1]))
        self.width = spec.width // 2 if spec.kind == VAE else spec.width
        self.channels = self.width * (spec.grid[0] // grid[0]) ** 2
        self.denoiser = Denoiser(hidden_size, self.channels, grid, settings.width, settings.layers, settings.heads)
        self.register_buffer("alpha_bar", cosine_schedule(), persistent=False)

    @override
    def forward(self, hidden_BLH: Tensor, batch: Batch, tower: Mapping[int, Tensor] = NOTHING) -> TermSums:
        hidden = hidden_BLH.flatten(0, 1)
        views, positions = batch.view_position.shape
        hidden_VPH = hidden.index_select(0, batch.view_position.clamp(min=0).flatten()).view(views, positions, -1)
        stored = batch.targets.get(self.settings.name)
        if stored is None:  # a micro-batch without images, which scores nothing
            stored = hidden.new_zeros(views, self.spec.positions, self.spec.width, dtype=torch.float32)
        t_VR, noise_VRPC, posterior_VQC = self.draw(batch)
        device = hidden.device
        values = latents(stored, self.spec, None if posterior_VQC is None else posterior_VQC.to(device))
        clean_VPC = stacked(values, self.grid, self.spec.grid)
        loss = self.score(hidden_VPH, clean_VPC, self._scored(batch), t_VR.to(device), noise_VRPC.to(device))
        return TermSums(loss[None], self.count_targets(batch), torch.zeros(0, dtype=torch.int64, device=device))

    def score(self, hidden_VPH: Tensor, clean_VPC: Tensor, mask_VP: Tensor, t_VR: Tensor, noise_VRPC: Tensor) -> Tensor:
        """Squared error of the noise, mean over channels and levels, summed over the positions of `mask_VP`."""
        repeats = t_VR.shape[1]
        rows = (
            hidden_VPH.repeat_interleave(repeats, dim=0),
            clean_VPC.repeat_interleave(repeats, dim=0),
            mask_VP.float().repeat_interleave(repeats, dim=0) / repeats,
            t_VR.flatten(),
            noise_VRPC.flatten(0, 1),
        )
        (loss,) = sum_over_chunks(self._score, self.rows_at_once, *rows)
        return loss

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Steps int64 (V, R), noise float32 (V, R, P, C) and what a posterior is sampled with, or None; on the CPU.

        A function of the view and the step, whatever the micro-batch and the rank.
        """
        views = batch.view_position.shape[0]
        keys = [0] * views if batch.view_keys is None else batch.view_keys.tolist()
        repeats, positions = self.settings.repeats, self.grid[0] * self.grid[1]
        sampled = self.spec.kind == VAE and self.settings.latents == "sample"
        steps, noises, posteriors = [], [], []
        for key in keys:
            named = hashlib.sha256(f"{batch.draw_seed} {key} {self.settings.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(named[:8], "little") >> 1)
            steps.append(torch.randint(0, STEPS, (repeats,), generator=generator))
            noises.append(torch.randn(repeats, positions, self.channels, generator=generator))
            if sampled:
                posteriors.append(torch.randn(self.spec.positions, self.width, generator=generator))
        return torch.stack(steps), torch.stack(noises), torch.stack(posteriors) if sampled else None

    @override
    def count_targets(self, batch: Batch) -> int:
        return int(self._scored(batch).sum())

    @override
    def flops_per_target(self) -> Forward:
        """Of all noise levels; cells that are not scored are context and go uncounted."""
        return self.denoiser.forward_flops(self.grid[0] * self.grid[1]) * self.settings.repeats

    @override
    def facts(self) -> dict[str, Any]:
        return {
            **self.settings.model_dump(mode="json", exclude={"manifests"}),
            "grid": list(self.grid),
            "channels": self.channels,
        }

    def _scored(self, batch: Batch) -> Tensor:
        whole_V1 = (batch.view_position != NO_TOKEN).all(dim=1, keepdim=True)
        return batch.target_mask & whole_V1

    def _score(
        self, hidden_RPH: Tensor, clean_RPC: Tensor, weight_RP: Tensor, t_R: Tensor, noise_RPC: Tensor
    ) -> tuple[Tensor]:
        noisy = add_noise(clean_RPC, noise_RPC, self.alpha_bar[t_R])
        error_RP = (self.denoiser(noisy, t_R, hidden_RPH) - noise_RPC).square().mean(dim=-1)
        return ((weight_RP * error_RP).sum(),)
