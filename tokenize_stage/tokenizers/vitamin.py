"""ViTamin, the encoder of UniTok: two stages of inverted-bottleneck convolutions, then transformer blocks.

Written from the paper (Chen et al., "ViTamin", CVPR 2024) and the names and shapes of UniTok's checkpoint; the
activations, epsilons and the pooling are those that reproduce the intermediate tensors of `tests/data/unitok`.
Modules carry the checkpoint's own names. Shape legend: B views, C channels, H rows, W columns, P positions, n width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tokenize_stage.config import ViTaminConfig

_EPS = 1e-6
_EXPANSION = 4
_MLP_RATIO = 2


class ViTamin(nn.Module):
    """float (B, 3, S, S) in [-1, 1] -> (B, P, n), row-major positions, after the final norm."""

    def __init__(self, config: ViTaminConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        # UniTok keeps one vector of zeros where others have a position embedding, and adds it to every position.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.ModuleDict({"backbone": ConvStages(config.widths, config.conv_blocks)})
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width, _EPS)

    def patches(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, P, n): the output of the convolutions."""
        maps_BnHW: torch.Tensor = self.patch_embed["backbone"](pixels_BCHW)
        return maps_BnHW.flatten(2).mT

    def transform(self, hidden_BPn: torch.Tensor) -> torch.Tensor:
        """(B, P, n): the transformer blocks and the final norm."""
        hidden_BPn = hidden_BPn + self.pos_embed
        for block in self.blocks:
            hidden_BPn = block(hidden_BPn)
        out: torch.Tensor = self.norm(hidden_BPn)
        return out

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.transform(self.patches(pixels_BCHW))


class ConvStages(nn.Module):
    """Stem, two stages and pool: each halves the picture, the last makes the transformer's width."""

    def __init__(self, widths: tuple[int, int, int], blocks: tuple[int, int]) -> None:
        super().__init__()
        first, second, out = widths
        self.stem = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(3, first, 3, stride=2, padding=1),
                "norm1": ChannelNorm(first, _EPS),
                "conv2": nn.Conv2d(first, first, 3, padding=1),
            }
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(ConvBlock(into if i == 0 else width, width, halve=i == 0) for i in range(count))
            for into, width, count in ((first, first, blocks[0]), (first, second, blocks[1]))
        )
        self.pool = nn.ModuleDict(
            {"norm": ChannelNorm(second, _EPS), "proj": nn.Conv2d(second, out, 3, stride=2, padding=1)}
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCHW = self.stem["conv2"](F.gelu(self.stem["norm1"](self.stem["conv1"](x_BCHW))))
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x_BCHW = block(x_BCHW)
        pooled: torch.Tensor = self.pool["proj"](self.pool["norm"](x_BCHW))
        return pooled


class ConvBlock(nn.Module):
    """Norm, 1x1 expansion, 3x3 depthwise, 1x1 projection, with a shortcut; exact GELU between them."""

    def __init__(self, into: int, width: int, *, halve: bool) -> None:
        super().__init__()
        inner = width * _EXPANSION
        self.halve = halve
        self.pre_norm = ChannelNorm(into, _EPS)
        self.conv1_1x1 = nn.Conv2d(into, inner, 1)
        self.conv2_kxk = nn.Conv2d(inner, inner, 3, stride=2 if halve else 1, padding=1, groups=inner)
        self.conv3_1x1 = nn.Conv2d(inner, width, 1)
        self.shortcut = nn.ModuleDict({"expand": nn.Conv2d(into, width, 1)} if into != width else {})

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        short_BCHW = x_BCHW
        if self.halve:
            # A mean over the pixels under the window: the padding at the border is not counted.
            short_BCHW = F.avg_pool2d(short_BCHW, 3, stride=2, padding=1, count_include_pad=False)
        for expand in self.shortcut.values():
            short_BCHW = expand(short_BCHW)
        inner_BCHW = F.gelu(self.conv1_1x1(self.pre_norm(x_BCHW)))
        inner_BCHW = F.gelu(self.conv2_kxk(inner_BCHW))
        out: torch.Tensor = self.conv3_1x1(inner_BCHW)
        return out + short_BCHW


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Pre-norm self-attention and gated MLP, each with its shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, _EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, _EPS)
        self.mlp = GatedMlp(width)

    def forward(self, x_BPn: torch.Tensor) -> torch.Tensor:
        query, key, value = heads_of(self.attn["qkv"](self.norm1(x_BPn)), self.heads)
        attended_BhPd = F.scaled_dot_product_attention(query, key, value)
        x_BPn = x_BPn + self.attn["proj"](attended_BhPd.transpose(1, 2).flatten(2))
        out: torch.Tensor = self.mlp(self.norm2(x_BPn))
        return x_BPn + out


class GatedMlp(nn.Module):
    """Norm, then `w2(gelu(w0 x) * w1 x)` with the tanh form of GELU (which the published encoder uses here only)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width * _MLP_RATIO
        self.norm = nn.LayerNorm(width, _EPS)
        self.w0 = nn.Linear(width, inner)
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)

    def forward(self, x_BPn: torch.Tensor) -> torch.Tensor:
        x_BPn = self.norm(x_BPn)
        out: torch.Tensor = self.w2(F.gelu(self.w0(x_BPn), approximate="tanh") * self.w1(x_BPn))
        return out


def heads_of(qkv_BPn: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of (B, P, 3 n), each (B, heads, P, n / heads)."""
    query, key, value = qkv_BPn.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return query, key, value
