"""VILA-U's depth head, run by `VisualHead.forward`: what a slot is told, and which slot predicts which code.

No user of this project runs that head; its layers differ from ASVR's (LayerNorm, one biased feed-forward and one
classifier for all depths, learnt slot embeddings, no hidden layer in the projector), so they are built here. What
must agree, and is the project's own, is everything around them: the codebook without its padding row, sums of the
vectors of the depths before, the hidden state first, the last depth's code told to nobody.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from train_stage.config import HeadConfig
from train_stage.visual_head import VisualHead

FIXTURE = Path(__file__).parents[1] / "data" / "vilau"
WIDTH, HEADS, DEPTH, CODES = 64, 4, 4, 96


class Slots(nn.Module):
    """Adds the learnt embedding of each slot."""

    def __init__(self, embedding_1DW: Tensor) -> None:
        super().__init__()
        self.embedding_1DW = embedding_1DW

    def forward(self, x_NDW: Tensor) -> Tensor:
        return x_NDW + self.embedding_1DW


class Block(nn.Module):
    """x = x + attention(norm(x)), then x + feed_forward(norm(x)), the same weights for every depth."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x_NDW: Tensor) -> Tensor:
        query, key, value = (
            self._linear(f"attn.{name}", self._norm("ln1", x_NDW)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed_NDW = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        x_NDW = x_NDW + self._linear("attn.proj", mixed_NDW)
        return x_NDW + self._linear("mlp.2", F.gelu(self._linear("mlp.0", self._norm("ln2", x_NDW))))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])


def linear(weights: dict[str, Tensor], name: str) -> nn.Linear:
    layer = nn.Linear(weights[f"{name}.weight"].shape[1], weights[f"{name}.weight"].shape[0])
    layer.load_state_dict({key: weights[f"{name}.{key}"] for key in ("weight", "bias")})
    return layer


def vila_u_head() -> VisualHead:
    stored = {name: tensor.float() for name, tensor in load_file(FIXTURE / "model.safetensors").items()}
    weights = {
        name.removeprefix("rqtransformer."): tensor
        for name, tensor in stored.items()
        if name.startswith("rqtransformer.")
    }
    book = stored["rqvaesiglip.quantizer.codebooks.0.weight"][:CODES].numpy()
    head = VisualHead(48, HeadConfig(width=WIDTH, layers=2, heads=HEADS, ffn=4 * WIDTH), [book] * DEPTH)
    head.projector = nn.Sequential(linear(weights, "in_mlp_2"))
    head.code_proj = linear(weights, "in_mlp_1")
    blocks = [
        Block({name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)})
        for prefix in (f"head_transformer.blocks.{n}." for n in range(2))
    ]
    head.blocks = nn.ModuleList([Slots(weights["pos_emb_d"]), *blocks])
    norm = nn.LayerNorm(WIDTH)
    norm.load_state_dict({key: weights[f"classifier_mlp.layer_norm.{key}"] for key in ("weight", "bias")})
    head.norm = norm  # type: ignore[assignment]
    head.classifiers = nn.ModuleList([linear(weights, "classifier_mlp.linear")] * DEPTH)
    return head


@torch.inference_mode()
def test_logits_and_losses_equal_the_reference() -> None:
    golden = load_file(FIXTURE / "golden.safetensors")
    numbers = json.loads((FIXTURE / "golden.json").read_text())
    codes_ND = golden["ids"].flatten(0, 1).long()
    logits = vila_u_head()(golden["head_hidden"].flatten(0, 1), codes_ND)
    torch.testing.assert_close(torch.stack(logits, 1), golden["head_logits"].flatten(0, 1), rtol=0, atol=5e-5)
    losses = [F.cross_entropy(logits_NK, codes_ND[:, d]).item() for d, logits_NK in enumerate(logits)]
    assert losses == pytest.approx(numbers["head_ce_per_depth"], rel=1e-5)
