"""The narrowing projection before the codebooks of UniTok and of the second DualToken: attention whose heads are averaged,
then a gated MLP.

Written from the names and shapes in the checkpoints and the intermediate tensors of `tests/data/unitok`. Modules carry
the checkpoints' own names. Shape legend: B views, P positions, n width in, m width out (n / m heads).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tokenize_stage.tokenizers.vitamin import GatedMlp, heads_of

_EPS = 1e-5
"""Of the outer norms; the one inside the MLP keeps the encoder's 1e-6."""


class AttentionProjection(nn.Module):
    """float (B, P, n) -> (B, P, m), m a divisor of n: `y = proj(norm3 x) + attn(norm1 x)`, then `y + mlp(norm2 y)`."""

    def __init__(self, into: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(into, _EPS)
        self.attn = HeadMeanAttention(into, width)
        self.norm3 = nn.LayerNorm(into, _EPS)
        self.proj = nn.Linear(into, width)
        self.norm2 = nn.LayerNorm(width, _EPS)
        self.mlp = GatedMlp(width)

    def forward(self, x_BPn: torch.Tensor) -> torch.Tensor:
        y_BPm = self.proj(self.norm3(x_BPn)) + self.attn(self.norm1(x_BPn))
        out: torch.Tensor = y_BPm + self.mlp(self.norm2(y_BPm))
        return out


class HeadMeanAttention(nn.Module):
    """Softmax attention with n / m heads of width m, whose mean (not concatenation) is projected."""

    def __init__(self, into: int, width: int) -> None:
        super().__init__()
        self.heads = into // width
        self.qkv = nn.Linear(into, 3 * into, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(into))
        self.zero_k_bias = nn.Parameter(torch.zeros(into))
        self.v_bias = nn.Parameter(torch.zeros(into))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BPn: torch.Tensor) -> torch.Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        query, key, value = heads_of(F.linear(x_BPn, self.qkv.weight, bias), self.heads)
        out: torch.Tensor = self.proj(F.scaled_dot_product_attention(query, key, value).mean(1))
        return out
