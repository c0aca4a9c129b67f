"""DualToken's other branch, shared codebooks and second generation.

No golden numbers exist for these and their public weights were not available to check against: they are compared with
transformers' own SigLIP run whole, and with the projections written out here tensor by tensor.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from made_dualtoken import (
    CODES,
    DATA,
    DEPTH,
    GOLDEN,
    LAYERS,
    NARROW,
    POSITIONS,
    WIDTH,
    State,
    edit_config,
    edit_state,
    golden_state,
    hidden_states,
    loaded,
    make_second_generation,
    one_sentence,
    rows,
    tokenizer,
    views,
)
from torch.nn import functional as F

from manifests.errors import InputError
from tokenize_stage.identity import describe
from tokenize_stage.search import oracle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden tokenizer in a folder that a test may change."""
    return shutil.copytree(DATA, tmp_path / "tokenizer")


@pytest.fixture
def second(folder: Path) -> Path:
    """The same with a checkpoint of the second generation."""
    make_second_generation(folder)
    return folder


def conv_block(state: State, x_BPn: torch.Tensor) -> torch.Tensor:
    def weights(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return state[f"prequant_visual.{name}.weight"].float(), state[f"prequant_visual.{name}.bias"].float()

    x = x_BPn.permute(0, 2, 1).reshape(len(x_BPn), WIDTH, 4, 4)
    h = F.conv2d(F.silu(F.group_norm(x, 32, *weights("norm1"), eps=1e-6)), *weights("conv1"))
    h = F.conv2d(F.silu(F.group_norm(h, 32, *weights("norm2"), eps=1e-6)), *weights("conv2"), padding=1)
    return (x + h).reshape(len(x_BPn), WIDTH, POSITIONS).permute(0, 2, 1)


def test_the_appearance_branch_starts_six_layers_in_for_so400m() -> None:
    state = golden_state()
    found = loaded(tokenizer(branch="appearance"))
    assert found.spec.settings["layer"] == LAYERS - 21  # 27 layers: 6
    wanted = conv_block(state, hidden_states(state)[LAYERS - 21])
    torch.testing.assert_close(found.encoder.features(views()), wanted, atol=5e-5, rtol=0)
    books = rows(state, "quantizer")
    codes = found.encode(views())
    assert torch.equal(codes.flatten(0, 1), oracle(found.encoder.features(views()).flatten(0, 1), books))
    assert not torch.equal(codes, GOLDEN["semantic_codes"].int())


def share(state: State, copies: int) -> None:
    for depth in range(DEPTH):
        book = state.pop(f"quantizer_semantic.codebooks.{depth}.weight")
        first = state.setdefault("quantizer_semantic.codebooks.0.weight", book)
        if depth < copies:
            state[f"quantizer_semantic.codebooks.{depth}.weight"] = first.clone()


def test_a_shared_codebook_may_be_stored_once_or_for_each_depth(folder: Path) -> None:
    edit_config(folder, shared_codebook=True)
    codes = []
    for copies in (1, DEPTH):
        edit_state(folder, lambda state, copies=copies: share(state, copies))
        found = loaded(tokenizer(folder))
        assert len(found.codebooks()) == DEPTH
        codes.append(found.encode(views()))
    assert torch.equal(*codes)
    first = rows(golden_state(), "quantizer_semantic")[0]
    assert torch.equal(codes[0].flatten(0, 1), oracle(GOLDEN["hidden"].flatten(0, 1), [first] * DEPTH))


def test_shared_codebooks_that_differ_are_refused(folder: Path) -> None:
    edit_config(folder, shared_codebook=True)
    with pytest.raises(InputError, match="different codebooks in quantizer_semantic") as error:
        describe(tokenizer(folder)).codebooks()
    one_sentence(str(error.value))


def test_training_buffers_are_ignored(folder: Path) -> None:
    def add(state: State) -> None:
        for depth in range(DEPTH):
            state[f"quantizer_semantic.codebooks.{depth}.cluster_size_ema"] = torch.zeros(CODES)
            state[f"quantizer_semantic.codebooks.{depth}.embed_ema"] = torch.full((CODES, WIDTH), 7.0)

    edit_state(folder, add)
    assert torch.equal(loaded(tokenizer(folder)).encode(views()), GOLDEN["semantic_codes"].int())


def attention_projection(state: State, prefix: str, x_BPn: torch.Tensor) -> torch.Tensor:
    """The projection, head by head."""
    own = {key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")}

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"], eps)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]

    x = norm("norm1", x_BPn, 1e-5)
    q, k, v = (x @ part.T for part in own["attn.qkv.weight"].split(WIDTH))
    q, v = q + own["attn.q_bias"], v + own["attn.v_bias"]
    heads = []
    for start in range(0, WIDTH, NARROW):
        part = slice(start, start + NARROW)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / NARROW**0.5
        heads.append(scores.softmax(-1) @ v[..., part])
    out = linear("proj", norm("norm3", x_BPn, 1e-5)) + linear("attn.proj", sum(heads) / len(heads))
    inner = norm("mlp.norm", norm("norm2", out, 1e-5), 1e-6)
    gate = F.gelu(linear("mlp.w0", inner), approximate="tanh")
    return out + linear("mlp.w2", gate * linear("mlp.w1", inner))


@pytest.mark.parametrize("branch", ["semantic", "appearance"])
def test_the_second_generation_by_its_formulas(second: Path, branch: str) -> None:
    state: State = torch.load(second / "dualtoken_tiny.pt", weights_only=True)["state_dict"]
    hidden = hidden_states(state)
    if branch == "semantic":
        wanted = attention_projection(state, "prequant_sem", hidden[LAYERS - 1])
    else:
        wanted = attention_projection(state, "prequant_pix", hidden[6])
        wanted = wanted + 0.6 * attention_projection(state, "prequant_shortcut", hidden[4])
    found = loaded(tokenizer(second, branch))
    assert (found.spec.depth, found.spec.code_dim, found.spec.settings["generation"]) == (4, NARROW, 2)
    features = found.encoder.features(views())
    torch.testing.assert_close(features, wanted, atol=5e-5, rtol=1e-5)
    books = rows(state, f"quantizer_{'sem' if branch == 'semantic' else 'pix'}", 4)
    assert torch.equal(found.encode(views()).flatten(0, 1), oracle(features.flatten(0, 1), books))
