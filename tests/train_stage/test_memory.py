"""The memory that is estimated against what autograd keeps, and the arithmetic of the ZeRO stages."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from train_stage.memory import activations, checkpoint_bytes, estimate, head_bytes, layer_bytes
from train_stage.objective_config import HeadConfig, ParallelHeadConfig
from train_stage.visual_head import build_head

TOKENS = 512


def kept_bytes(layers: int, dtype: torch.dtype, **changes: int) -> tuple[int, LlamaConfig]:
    """Bytes that a Llama's forward pass keeps for its backward pass."""
    config = LlamaConfig(
        **{
            "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": layers, "num_attention_heads": 8,
            "vocab_size": 64, **changes,
        }
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).model
    inputs = torch.randn(1, TOKENS, config.hidden_size, dtype=dtype, requires_grad=True)
    return kept_by(model, lambda: model(inputs_embeds=inputs, use_cache=False)), config


def kept_by(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of distinct memory, weights left out, that are kept for the backward pass of `run`."""
    weights = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # holding it keeps its address its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_layer_keeps_about_what_is_estimated(dtype: torch.dtype, bytes_each: int) -> None:
    few, _ = kept_bytes(1, dtype)
    many, config = kept_bytes(3, dtype)
    assert layer_bytes(config, bytes_each) == pytest.approx((many - few) / 2 / TOKENS, rel=0.02)


def test_recomputing_keeps_an_input_a_layer() -> None:
    _, config = kept_bytes(3, torch.float32)
    all_of_it = activations(config, TOKENS, 0, bytes_each=4, recompute=False)
    little = activations(config, TOKENS, 0, bytes_each=4, recompute=True)
    logits = TOKENS * config.vocab_size * 12
    assert all_of_it == 3 * TOKENS * layer_bytes(config, 4) + logits
    assert little == TOKENS * (3 * 256 * 4 + layer_bytes(config, 4)) + logits


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize(
    "config", [HeadConfig(width=32, layers=2, heads=4, ffn=64), ParallelHeadConfig(kind="parallel", width=48)]
)
def test_a_head_keeps_what_is_counted_without_numbers(
    config: HeadConfig | ParallelHeadConfig, dtype: torch.dtype, bytes_each: int
) -> None:
    positions, hidden_size, sizes = 16, 24, (10, 12, 14)
    codebooks = [np.ones((size, 8), np.float32) for size in sizes]
    head = build_head(hidden_size, config, codebooks).to(dtype)
    hidden = torch.randn(positions, hidden_size, dtype=dtype, requires_grad=True)
    codes = torch.zeros(positions, len(sizes), dtype=torch.long)
    kept = kept_by(head, lambda: head(hidden, codes))
    logits = positions * sum(sizes) * (bytes_each + 8)
    assert head_bytes(head, hidden_size, positions, bytes_each) == pytest.approx(kept + logits, rel=0.02)


def test_the_larger_of_the_heads_counts() -> None:
    _, config = kept_bytes(1, torch.float32)
    layer = TOKENS * layer_bytes(config, 4)
    text = TOKENS * config.vocab_size * 12
    for heads, larger in ((0.0, text), (text + 7.0, text + 7)):
        assert activations(config, TOKENS, heads, bytes_each=4, recompute=False) == layer + larger


def test_zero_divides_states_then_gradients_then_weights() -> None:
    def of(stage: int, **offload: bool) -> tuple[float, float, float, float]:
        own = estimate(1000, 500, bytes_each=2, stage=stage, gpus=4, activations=7, **offload)
        assert own.total == own.weights + own.gradients + own.states + 7
        return own.weights, own.gradients, own.states, own.host

    assert of(1) == (2000, 500 * 6, 500 * 12 / 4, 0)
    assert of(2) == (2000, 500 * 6 / 4, 500 * 12 / 4, 0)
    assert of(3) == (500, 500 * 6 / 4, 500 * 12 / 4, 0)
    assert of(2, offload=True) == (2000, 500 * 6 / 4, 0, 500 * 12 / 4)
    assert of(3, offload_weights=True) == (0, 500 * 6 / 4, 500 * 12 / 4, 500)
    assert of(2, offload_weights=True) == of(2), "DeepSpeed moves weights in stage 3 alone"
    in_float32 = estimate(1000, 500, bytes_each=4, stage=1)
    assert in_float32.gradients == 500 * 4


def test_a_checkpoint_has_states_of_what_trains_and_weights_of_what_is_carried() -> None:
    assert checkpoint_bytes(trained=10, carried=30, bytes_each=2) == 10 * 14 + 30 * 2
