"""Attention over samples end to end in one row, each seeing only itself: the one place that chooses how it is computed.

| language model                    | where                | how                                                     |
|-----------------------------------|----------------------|---------------------------------------------------------|
| of `OWN_ATTENTION`                | `takes_one_call`     | `torch.nn.attention.varlen`, one call for the whole row |
| of `OWN_ATTENTION`                | elsewhere            | `scaled_dot_product_attention`, sample after sample     |
| any other that takes position_ids | everywhere           | Transformers' own, with a mask over the whole row       |

The work of the first two is the sum of the samples' squares, that of the last the square of the sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "asvr_packed"

OWN_ATTENTION = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that are known to hand `cu_seq_lens_q` down to their attention (the tests run each)."""


class Bounds(NamedTuple):
    """Where samples begin in a row, int32 (N+1,) with the row's length at the end, and the longest sample's length."""

    starts: Tensor
    longest: int


def use_own_attention(language_model: PreTrainedModel) -> bool:
    """Let a model attend as `packed_inputs` asks, if it can; it still generates as before. Whether it can."""
    if language_model.config.model_type not in OWN_ATTENTION:
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    language_model.set_attn_implementation(NAME)
    return True


def compile_layers(language_model: PreTrainedModel) -> None:
    """Compile each decoder layer (torch.compile), for rows of any length; layers of one shape share what is compiled.

    Own attention is left out: it loops over samples of any length, which would be compiled over and over again.
    """
    if getattr(language_model.config, "_attn_implementation", None) == NAME:
        AttentionInterface.register(NAME, torch.compiler.disable(_attend))
    for layer in language_model.layers:
        layer.compile(dynamic=True)


def packed_inputs(language_model: PreTrainedModel, position_ids: Tensor) -> dict[str, Any]:
    """What a forward pass over rows of samples needs beside its embeddings; `position_ids` int64 (B, L) as in `Batch`.

    Without a mask and without a cache, positions that start again tell Transformers where one sample ends.
    """
    inputs: dict[str, Any] = {"position_ids": position_ids, "use_cache": False}
    if getattr(language_model.config, "_attn_implementation", None) != NAME or position_ids.shape[0] != 1:
        return inputs
    bounds = find_bounds(position_ids)
    return inputs | {
        # Of four dimensions, so that Transformers takes it for finished and makes none; nobody looks at it.
        "attention_mask": position_ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
        "cu_seq_lens_q": bounds.starts,
        "cu_seq_lens_k": bounds.starts,
        "max_length_q": bounds.longest,
        "max_length_k": bounds.longest,
    }


def find_bounds(position_ids: Tensor) -> Bounds:
    """The samples of a row of positions (1, L)."""
    begins = (position_ids[0] == 0).nonzero()[:, 0].to(torch.int32)
    starts = F.pad(begins, (0, 1), value=position_ids.shape[1])
    return Bounds(starts, int(position_ids.max()) + 1)


def takes_one_call(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the flash kernel behind `varlen_attn` takes heads of `width` there; others it refuses with an error."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """(B, L, heads, width) of the attention of query, key and value (B, heads, L, width), as Transformers calls it."""
    if cu_seq_lens_q is None:  # generation
        mask = attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout, **more)
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    if dropout == 0 and takes_one_call(query.device, query.dtype, query.shape[-1]):
        return _varlen(query, key, value, Bounds(cu_seq_lens_q, max_length_q), scaling, window), None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    attended = [
        F.scaled_dot_product_attention(
            own_query,
            own_key,
            own_value,
            attn_mask=None if window is None else _band(own_query.shape[2], window, query.device),
            dropout_p=dropout,
            is_causal=window is None,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        for own_query, own_key, own_value in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """bool (L, L): a token sees itself and the window - 1 before it."""
    places = torch.arange(length, device=device)
    back = places[:, None] - places
    return (back >= 0) & (back < window)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    back = -1 if window is None else window - 1
    query_THd, key_THd, value_THd = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    attended = varlen_attn(
        query_THd,
        key_THd,
        value_THd,
        bounds.starts,
        bounds.starts,
        bounds.longest,
        bounds.longest,
        scale=scaling,
        window_size=(back, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return cast("Tensor", attended)[None]
