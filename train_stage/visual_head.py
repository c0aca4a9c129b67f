"""The ASVR visual head: a small transformer over the depths of one position.

Formulas follow the released ASVR code (rqtransformer/modeling_rqtransformer.py), whose numbers the tests
reproduce. Shapes: N positions, H hidden width of the language model, W width of the head, D depths, F width of a
feed-forward layer, K_d size of the codebook at depth d, C width of a codebook vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_stage.flops import Forward, linear_elements
from train_stage.objective_config import HeadConfig, ParallelHeadConfig

NORM_EPS = 1e-6


class DepthAttention(nn.Module):
    """Causal self-attention over the D slots of a position, without positional embedding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_NDW: Tensor) -> Tensor:
        n, depth, width = x_NDW.shape
        query, key, value = (
            part.reshape(n, depth, self.heads, width // self.heads).transpose(1, 2)
            for part in self.in_proj(x_NDW).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(n, depth, width))


class DepthFeedForward(nn.Module):
    """One bias-free two-layer GELU network per depth: out[d] = down[d] gelu(up[d] x[d]).

    The released checkpoints also hold biases for these layers, which its forward pass never uses.
    """

    def __init__(self, depth: int, width: int, inner: int) -> None:
        super().__init__()
        self.up_DWF = nn.Parameter(torch.empty(depth, width, inner))
        self.down_DFW = nn.Parameter(torch.empty(depth, inner, width))
        # The range nn.Linear would start from, had each depth a layer of its own.
        nn.init.uniform_(self.up_DWF, -1 / math.sqrt(width), 1 / math.sqrt(width))
        nn.init.uniform_(self.down_DFW, -1 / math.sqrt(inner), 1 / math.sqrt(inner))

    def forward(self, x_NDW: Tensor) -> Tensor:
        inner_DNF = F.gelu(torch.bmm(x_NDW.transpose(0, 1), self.up_DWF))
        return torch.bmm(inner_DNF, self.down_DFW).transpose(0, 1)


class SharedFeedForward(nn.Module):
    """One bias-free two-layer GELU network for all depths: 1/D of the parameters, the same arithmetic."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_NDW: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_NDW)))


class DepthBlock(nn.Module):
    """x = x + attention(norm1(x)), then y = norm2(x), then y + feed_forward(y).

    The second residual is taken after the norm, not before it: that is what the release computes.
    """

    def __init__(self, depth: int, config: HeadConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.attention = DepthAttention(config.width, config.heads)
        self.norm2 = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.feed_forward = (
            SharedFeedForward(config.width, config.ffn)
            if config.shared_feed_forward
            else DepthFeedForward(depth, config.width, config.ffn)
        )

    def forward(self, x_NDW: Tensor) -> Tensor:
        y_NDW = self.norm2(x_NDW + self.attention(self.norm1(x_NDW)))
        return y_NDW + self.feed_forward(y_NDW)


class VisualHead(nn.Module):
    """Predicts the D codes of a position from the language model's last hidden state there, depth after depth.

    Slot 0 of the depth transformer is the projected hidden state. Slot d > 0 is a linear map of what the true codes
    of the depths before d stand for (teacher forcing), so slot d's logits may depend on codes 0..d-1 only:
    `residual` codebooks: the sum of the vectors of depths 0..d-1, the best reconstruction so far;
    independent codebooks: the vector of depth d-1 alone, the ones before it being visible through the attention,
    because a sum of vectors of unrelated codebooks stands for nothing.

    Args:
        hidden_size: H.
        config: width, layers, heads and ffn of the depth transformer.
        codebooks: D arrays float32 (K_d, C), as the manifest's codebook file holds them. They are buffers that no
            checkpoint keeps: the manifest does.
        residual: whether depth d quantises what the depths before it left over.
    """

    def __init__(
        self, hidden_size: int, config: HeadConfig, codebooks: Sequence[np.ndarray], *, residual: bool = True
    ) -> None:
        super().__init__()
        self.depth = len(codebooks)
        self.codebook_sizes = tuple(len(codebook) for codebook in codebooks)
        self.residual = residual
        self.projector = nn.Sequential(
            nn.Linear(hidden_size, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )
        self.code_proj = nn.Linear(codebooks[0].shape[1], config.width) if self.depth > 1 else None
        self.blocks = nn.ModuleList(DepthBlock(self.depth, config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.classifiers = nn.ModuleList(_classifier(config.width, len(codebook)) for codebook in codebooks)
        for d, codebook in enumerate(codebooks[:-1]):  # no slot is told the last depth's code
            # A copy: memory-mapped arrays are read-only, and torch must not write into the file's pages.
            vectors_KC = torch.from_numpy(np.array(codebook, dtype=np.float32))
            self.register_buffer(f"codebook_{d}", vectors_KC, persistent=False)

    def forward(self, hidden_NH: Tensor, codes_ND: Tensor) -> list[Tensor]:
        """D tensors of logits (N, K_d) for hidden states (N, H) and true codes int64 (N, D)."""
        x_NDW = self.projector(hidden_NH).unsqueeze(1)
        if self.code_proj is not None:
            context = self._context(codes_ND).to(x_NDW.dtype)
            x_NDW = torch.cat([x_NDW, self.code_proj(context)], dim=1)
        for block in self.blocks:
            x_NDW = block(x_NDW)
        x_NDW = self.norm(x_NDW)
        return [classifier(x_NDW[:, d]) for d, classifier in enumerate(self.classifiers)]

    def forward_flops(self) -> Forward:
        """FLOPs of one position; what the slots are told of its codes carries no gradient."""
        depth, width = self.depth, self.norm.weight.numel()
        weights = linear_elements(self.projector) + linear_elements(self.classifiers)
        weights += depth * linear_elements(self.blocks)
        # Where every slot has a feed-forward network of its own, each of their weights is used once.
        weights += sum(parameter.numel() for parameter in self.blocks.parameters() if parameter.ndim == 3)
        told = 0 if self.code_proj is None else (depth - 1) * self.code_proj.weight.numel()
        return Forward(weights=2.0 * weights, first=2.0 * told, pairs=4.0 * len(self.blocks) * depth**2 * width)

    def _context(self, codes_ND: Tensor) -> Tensor:
        """float32 (N, D-1, C): what slots 1..D-1 are told; sums are float32 whatever the model's dtype."""
        vectors = [F.embedding(codes_ND[:, d], self.get_buffer(f"codebook_{d}")).float() for d in range(self.depth - 1)]
        stacked = torch.stack(vectors, dim=1)
        return stacked.cumsum(dim=1) if self.residual else stacked


class ParallelHead(nn.Module):
    """Predicts each of the D codes from the hidden state alone: one linear layer or two-layer GELU network per depth.

    No depth is told another's code, so given the hidden state the depths are independent; it needs no codebooks.

    Args:
        hidden_size: H.
        config: hidden width of the networks, or none for linear layers.
        codebook_sizes: K_d of each depth.
    """

    def __init__(self, hidden_size: int, config: ParallelHeadConfig, codebook_sizes: Sequence[int]) -> None:
        super().__init__()
        self.codebook_sizes = tuple(codebook_sizes)
        self.networks = nn.ModuleList(
            _classifier(hidden_size, size)
            if config.width is None
            else nn.Sequential(nn.Linear(hidden_size, config.width), nn.GELU(), _classifier(config.width, size))
            for size in codebook_sizes
        )

    def forward(self, hidden_NH: Tensor, codes_ND: Tensor) -> list[Tensor]:  # noqa: ARG002
        """D tensors of logits (N, K_d) for hidden states (N, H); the codes are not looked at."""
        return [network(hidden_NH) for network in self.networks]

    def forward_flops(self) -> Forward:
        """FLOPs of one position."""
        return Forward(weights=2.0 * linear_elements(self.networks))


def build_head(
    hidden_size: int,
    config: HeadConfig | ParallelHeadConfig,
    codebooks: Sequence[np.ndarray],
    *,
    residual: bool = True,
) -> VisualHead | ParallelHead:
    """The head a recipe asks for; for the arguments see the classes."""
    if isinstance(config, ParallelHeadConfig):
        return ParallelHead(hidden_size, config, [len(codebook) for codebook in codebooks])
    return VisualHead(hidden_size, config, codebooks, residual=residual)


def _classifier(width: int, size: int) -> nn.Linear:
    """A layer of near-zero logits, so that the first visual loss is ln K; any other number points to a fault."""
    layer = nn.Linear(width, size)
    nn.init.normal_(layer.weight, std=0.1 / math.sqrt(width))
    nn.init.zeros_(layer.bias)
    return layer
