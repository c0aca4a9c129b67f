"""The vision tower of QLIP: a vision transformer in the manner of EVA-02 (sub-layer norms, SwiGLU, rotary positions).

Written from the papers (Fang et al., "EVA-02"; Su et al., "RoFormer") and the names and shapes of QLIP's
checkpoint; what they leave open is what reproduces the intermediate tensors of `tests/data/qlip`. Modules carry the
checkpoint's own names. Shape legend: B views, C channels, H rows, W columns, T tokens (the class token, then P
positions), h heads, d width of a head, n width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tokenize_stage.identities.qlip import EvaShape

_ROPE_GRID = 16
"""Positions are scaled to a grid of this many rows and columns, whatever the real one."""

_ROPE_THETA = 10_000.0


class EvaViT(nn.Module):
    """float (B, 3, S, S) -> (B, P, n), row-major positions: the last block's output as it is, no norm after it."""

    def __init__(self, shape: EvaShape) -> None:
        super().__init__()
        self.embeddings = Embeddings(shape)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(shape) for _ in range(shape.blocks))})

    def forward(self, pixels_BCHW: torch.Tensor, cos_Pd: torch.Tensor, sin_Pd: torch.Tensor) -> torch.Tensor:
        """`cos_Pd`, `sin_Pd`: float32, as `rope_tables` makes them."""
        hidden_BTn = self.embeddings(pixels_BCHW)
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            hidden_BTn = layer(hidden_BTn, cos_Pd, sin_Pd)
        positions_BPn: torch.Tensor = hidden_BTn[:, 1:]
        return positions_BPn


class Embeddings(nn.Module):
    """Class token and patches, each with its learnt position."""

    def __init__(self, shape: EvaShape) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(shape.width))
        self.patch_embedding = nn.Conv2d(3, shape.width, shape.patch, stride=shape.patch)
        self.position_embedding = nn.Embedding(shape.grid**2 + 1, shape.width)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        patches_BPn = self.patch_embedding(pixels_BCHW).flatten(2).mT
        class_B1n = self.class_embedding.expand(len(patches_BPn), 1, -1)
        return torch.cat([class_B1n, patches_BPn], 1) + self.position_embedding.weight


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU, each with its shortcut."""

    def __init__(self, shape: EvaShape) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(shape.width, shape.eps)
        self.self_attn = RotaryAttention(shape)
        self.layer_norm2 = nn.LayerNorm(shape.width, shape.eps)
        self.mlp = SwiGlu(shape)

    def forward(self, x_BTn: torch.Tensor, cos_Pd: torch.Tensor, sin_Pd: torch.Tensor) -> torch.Tensor:
        x_BTn = x_BTn + self.self_attn(self.layer_norm1(x_BTn), cos_Pd, sin_Pd)
        out: torch.Tensor = x_BTn + self.mlp(self.layer_norm2(x_BTn))
        return out


class RotaryAttention(nn.Module):
    """Softmax attention, queries and keys turned by their position, a norm before the output projection."""

    def __init__(self, shape: EvaShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj = nn.Linear(shape.width, shape.width)
        self.k_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.width)
        self.inner_attn_ln = nn.LayerNorm(shape.width, shape.eps)
        self.out_proj = nn.Linear(shape.width, shape.width)

    def forward(self, x_BTn: torch.Tensor, cos_Pd: torch.Tensor, sin_Pd: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            project(x_BTn).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = turn(query, cos_Pd, sin_Pd), turn(key, cos_Pd, sin_Pd)
        attended_BhTd = F.scaled_dot_product_attention(query, key, value)
        out: torch.Tensor = self.out_proj(self.inner_attn_ln(attended_BhTd.transpose(1, 2).flatten(2)))
        return out


class SwiGlu(nn.Module):
    """`w3(norm(silu(w1 x) * w2 x))`."""

    def __init__(self, shape: EvaShape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.width, shape.inner)
        self.w2 = nn.Linear(shape.width, shape.inner)
        self.ffn_ln = nn.LayerNorm(shape.inner, shape.eps)
        self.w3 = nn.Linear(shape.inner, shape.width)

    def forward(self, x_BTn: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.w3(self.ffn_ln(F.silu(self.w1(x_BTn)) * self.w2(x_BTn)))
        return out


def turn(x_BhTd: torch.Tensor, cos_Pd: torch.Tensor, sin_Pd: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of neighbouring numbers by its position's angle; the class token keeps its direction."""
    positions = x_BhTd[:, :, 1:]
    even, odd = positions.unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turned = torch.stack([-odd, even], -1).flatten(-2)
    turned = positions * cos_Pd + quarter_turned * sin_Pd
    return torch.cat([x_BhTd[:, :, :1], turned.to(x_BhTd.dtype)], 2)


def rope_tables(grid: int, head_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angles, float32 (P, d), P = grid^2 row-major, d a multiple of 4.

    The first half of a head turns with the row, the second with the column; pair j of a half turns by
    `place * 16 / grid / 10000^(4 j / d)`.
    """
    half = head_width // 2
    frequency = 1.0 / _ROPE_THETA ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    place = torch.arange(grid) / grid * _ROPE_GRID
    angle_gd = torch.outer(place, frequency).repeat_interleave(2, 1)
    row = angle_gd[:, None].expand(grid, grid, half)
    column = angle_gd[None].expand(grid, grid, half)
    angle_Pd = torch.cat([row, column], -1).flatten(0, 1)
    return angle_Pd.cos(), angle_Pd.sin()
