"""Samples in one row see only themselves, in every kind of language model that is told so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from train_stage.attention import NAME, OWN_ATTENTION, find_bounds, packed_inputs, takes_one_call, use_own_attention

LENGTHS = (7, 1, 12, 2)
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gpt2": GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


def made(kind: str) -> tuple[PreTrainedModel, Tensor, Tensor]:
    """A model, and the embeddings and positions of samples of `LENGTHS` in a row."""
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[kind]).eval()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return model, torch.randn(1, sum(LENGTHS), 32), positions


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_hidden_states_equal_separate_ones(kind: str) -> None:
    model, embeds, positions = made(kind)
    with torch.no_grad():
        alone = [model(inputs_embeds=own).last_hidden_state for own in embeds.split(LENGTHS, dim=1)]
        assert use_own_attention(model) == (kind in OWN_ATTENTION)
        packed = model(inputs_embeds=embeds, **packed_inputs(model, positions)).last_hidden_state
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", OWN_ATTENTION)
def test_gradients_equal_those_of_a_mask(kind: str) -> None:
    model, embeds, positions = made(kind)
    gradients = []
    for own in (False, True):
        assert not own or use_own_attention(model)
        leaf = embeds.clone().requires_grad_()
        model.zero_grad()
        model(inputs_embeds=leaf, **packed_inputs(model, positions)).last_hidden_state.square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert model.config._attn_implementation == NAME
    for masked, own_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(own_gradient, masked, rtol=1e-4, atol=1e-5)


def test_it_generates_as_before() -> None:
    """Padded on the left, with a cache: as `asvr eval` asks a model in memory."""
    model, embeds, _ = made("llama")
    rows, mask = embeds[:, :12].view(2, 6, 32), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    found = []
    with torch.no_grad():
        for own in (False, True):
            assert not own or use_own_attention(model)
            first = model(inputs_embeds=rows, attention_mask=mask, use_cache=True)
            longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            then = model(inputs_embeds=rows[:, :1], attention_mask=longer, past_key_values=first.past_key_values)
            found.append(torch.cat([first.last_hidden_state[:, 2:], then.last_hidden_state], dim=1))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_bounds() -> None:
    bounds = find_bounds(torch.cat([torch.arange(length) for length in LENGTHS])[None])
    assert (bounds.starts.tolist(), bounds.longest) == ([0, 7, 8, 20, 22], 12)


@pytest.mark.parametrize(
    ("device", "dtype", "width", "takes"),
    [
        ("cuda", torch.bfloat16, 128, True),
        ("cuda", torch.float16, 256, True),
        ("cuda", torch.bfloat16, 100, False),
        ("cuda", torch.bfloat16, 264, False),
        ("cuda", torch.float32, 128, False),
        ("cpu", torch.bfloat16, 128, False),
    ],
)
def test_the_flash_kernel_is_asked_only_for_what_it_takes(
    device: str, dtype: torch.dtype, width: int, takes: bool
) -> None:
    assert takes_one_call(torch.device(device), dtype, width) is takes


@pytest.mark.gpu
@pytest.mark.parametrize("kind", OWN_ATTENTION)
def test_one_call_for_a_row_on_a_gpu(kind: str) -> None:
    model, embeds, positions = made(kind)
    assert takes_one_call(torch.device("cuda"), torch.bfloat16, SIZES["hidden_size"] // SIZES["num_attention_heads"])
    model, embeds, positions = model.to("cuda", torch.bfloat16), embeds.to("cuda", torch.bfloat16), positions.cuda()
    with torch.no_grad():
        masked = model(inputs_embeds=embeds, **packed_inputs(model, positions)).last_hidden_state
        use_own_attention(model)
        packed = model(inputs_embeds=embeds, **packed_inputs(model, positions)).last_hidden_state
    torch.testing.assert_close(packed, masked, rtol=0.05, atol=0.05)
