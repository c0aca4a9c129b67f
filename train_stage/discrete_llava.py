"""A language model that is shown codes instead of pixels: each image position is the vectors of its codes, projected.

The paper's ablation (arXiv 2506.09040, Table 2: "discrete input"). This file also stands in every export of such a model,
where `load(folder)` needs nothing but torch, transformers and safetensors:

    from discrete_llava import load
    model, tokenizer = load(".")
    logits = model(input_ids, codes)      # codes int64 (V, P, D) of the V images, in the order of their tokens

Shapes: B rows, L tokens, V images, P positions of an image, D depths, C width of a code's vector, H of the language model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SETTINGS = "discrete_llava.json"
WEIGHTS = "image_input.safetensors"
"""Projector and codebooks; the language model stands beside them in its own files."""


class CodeEmbedding(nn.Module):
    """Codes (..., D) become vectors (..., C), float32: the sum over depths of residual codebooks, which is the tokenizer's
    reconstruction of the feature; of independent codebooks the vectors side by side."""

    def __init__(self, codebooks: Sequence[Tensor], *, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.depth = len(codebooks)
        for d, vectors_KC in enumerate(codebooks):
            # Buffers that no checkpoint keeps: the manifest has them.
            self.register_buffer(f"codebook_{d}", vectors_KC, persistent=False)

    @property
    def width(self) -> int:
        """C."""
        widths = [self.get_buffer(f"codebook_{d}").shape[1] for d in range(self.depth)]
        return widths[0] if self.residual else sum(widths)

    def forward(self, codes: Tensor) -> Tensor:
        vectors = [F.embedding(codes[..., d], self.get_buffer(f"codebook_{d}")) for d in range(self.depth)]
        return torch.stack(vectors).sum(dim=0) if self.residual else torch.cat(vectors, dim=-1)


class DiscreteLlava(nn.Module):
    """A causal language model, a two-layer GELU projector and the codebooks."""

    def __init__(self, language_model: Any, code_embedding: CodeEmbedding, image_token_id: int) -> None:
        super().__init__()
        self.language_model = language_model
        self.code_embedding = code_embedding
        width = language_model.config.hidden_size
        self.linear_1, self.linear_2 = nn.Linear(code_embedding.width, width), nn.Linear(width, width)
        self.image_token_id = image_token_id

    def embed(self, input_ids: Tensor, codes: Tensor) -> Tensor:
        """(B, L, H): the codes' projections at the image tokens, of which there are V * P; ValueError for another number."""
        embeds = self.language_model.get_input_embeddings()(input_ids)
        at_image = input_ids == self.image_token_id
        if int(at_image.sum()) != codes.shape[0] * codes.shape[1]:
            raise ValueError(f"{int(at_image.sum())} image tokens for codes of shape {tuple(codes.shape)}")
        vectors = self.code_embedding(codes).to(self.linear_1.weight.dtype)
        projected = self.linear_2(F.gelu(self.linear_1(vectors)))
        return embeds.masked_scatter(at_image.unsqueeze(-1), projected.to(embeds.dtype))

    def forward(self, input_ids: Tensor, codes: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, L, vocabulary)."""
        logits: Tensor = self.language_model(
            inputs_embeds=self.embed(input_ids, codes), attention_mask=attention_mask
        ).logits
        return logits

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, codes: Tensor, **settings: Any) -> Tensor:
        """The new tokens, as `generate` of the language model gives them."""
        new: Tensor = self.language_model.generate(inputs_embeds=self.embed(input_ids, codes), **settings)
        return new


def load(folder: str | Path, *, device: str = "cpu") -> tuple[DiscreteLlava, Any]:
    """The exported model, in the dtype of its files, and its tokenizer."""
    folder = Path(folder)
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    language_model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    codebooks = [tensors[f"codebook_{d}"] for d in range(len(settings["codebook_sizes"]))]
    embedding = CodeEmbedding(codebooks, residual=settings["residual"])
    model = DiscreteLlava(language_model, embedding, settings["image_token_id"])
    for name in ("linear_1", "linear_2"):
        layer = getattr(model, name).to(tensors[f"{name}.weight"].dtype)
        layer.load_state_dict({part: tensors[f"{name}.{part}"] for part in ("weight", "bias")})
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)
