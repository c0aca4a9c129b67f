"""How many bytes a phase takes on a GPU and on disk: estimates from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from train_stage.losses import CHUNK
from train_stage.visual_head import ParallelHead, VisualHead

STATES = 12
"""Bytes a trained parameter: float32 master, and Adam's two moments (ZeRO, arXiv 1910.02054, section 3.1)."""

ACCUMULATED = 4
"""Bytes a trained parameter of the float32 sum of gradients."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU; `host` is what offloading moves to its share of the host's memory."""

    weights: float
    gradients: float
    states: float
    activations: float
    host: float

    @property
    def total(self) -> float:
        """What the GPU holds."""
        return self.weights + self.gradients + self.states + self.activations


def estimate(
    total: int,
    trained: int,
    *,
    bytes_each: int,
    stage: int,
    offload: bool = False,
    offload_weights: bool = False,
    gpus: int = 1,
    activations: float = 0,
) -> Memory:
    """The states of ZeRO stage 1, 2 or 3 (arXiv 1910.02054), and the activations given.

    `offload` and, in stage 3 only, `offload_weights`: whether optimizer states and weights are on the host.

    Stage 1 divides the states by the GPUs, stage 2 the gradients too, stage 3 the weights too. Gradients are the
    model's own and, in bfloat16, their float32 sum.
    """
    gradient = trained * (bytes_each + (ACCUMULATED if bytes_each < ACCUMULATED else 0))
    states = trained * STATES / gpus
    weights = total * bytes_each / (gpus if stage == 3 else 1)
    offload_weights = offload_weights and stage == 3
    return Memory(
        weights=0 if offload_weights else weights,
        gradients=gradient / (gpus if stage >= 2 else 1),
        states=0 if offload else states,
        activations=activations,
        host=(states if offload else 0) + (weights if offload_weights else 0),
    )


def layer_bytes(text: Any, bytes_each: int) -> float:
    """Bytes that a layer of a Llama-like language model keeps for the backward pass, a token.

    Two norms keep their input in float32, that divided by its length, and their output; attention its query, key,
    value and output; the gated feed-forward network four vectors of its inner width.
    """
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query = text.num_attention_heads * width
    key = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width
    norms = 2 * text.hidden_size * (4 + 2 * bytes_each)
    return float(norms + bytes_each * (2 * query + 2 * key + 4 * text.intermediate_size))


def head_bytes(head: VisualHead | ParallelHead, hidden_size: int, positions: int, bytes_each: int) -> float:
    """Bytes of a visual head while a chunk of `positions` is scored: what its pass keeps, and the logits of all depths.

    The pass is made with tensors that have shapes and no numbers, and what autograd saves of it is counted.
    """
    dtype = torch.bfloat16 if bytes_each == 2 else torch.float32
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # holding it keeps its address its own
        return tensor

    # Not the meta device: it would take the form of attention that keeps the scores.
    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        own = {
            name: torch.empty(tensor.shape, dtype=dtype, requires_grad=isinstance(tensor, nn.Parameter))
            for name, tensor in [*head.named_parameters(), *head.named_buffers()]
        }
        hidden_NH = torch.empty(positions, hidden_size, dtype=dtype, requires_grad=True)
        codes_ND = torch.empty(positions, len(head.codebook_sizes), dtype=torch.int64)
        functional_call(head, own, (hidden_NH, codes_ND))
    for weight in own.values():
        kept.pop(weight.untyped_storage()._cdata, None)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return float(saved + logit_bytes(positions, sum(head.codebook_sizes), bytes_each))


def logit_bytes(positions: int, classes: int, bytes_each: int) -> float:
    """Bytes of logits, their copy in float32 and the cross-entropy's gradient."""
    return float(positions * classes * (bytes_each + 8))


def activations(text: Any, tokens: int, heads: float, *, bytes_each: int, recompute: bool) -> float:
    """Bytes of a micro-batch of `tokens` in the layers, and of one chunk of the widest head; `heads` is that of the visual ones.

    With `recompute` a layer keeps its input alone, and one layer at a time everything.
    """
    layer = layer_bytes(text, bytes_each)
    layers = text.num_hidden_layers
    kept = layers * text.hidden_size * bytes_each + layer if recompute else layers * layer
    return float(tokens * kept + max(heads, logit_bytes(min(CHUNK, tokens), text.vocab_size, bytes_each)))


def checkpoint_bytes(trained: int, carried: int, bytes_each: int) -> float:
    """Bytes of a checkpoint: DeepSpeed's weights and states of what trains, and the weights that are carried on."""
    return float(trained * (bytes_each + STATES) + carried * bytes_each)
