"""DualToken: the numbers of the published code, both generations, and every wrong file refused in one sentence.

The golden numbers (`tests/data/dualtoken_asvr`, made with ASVR's own code) cover the first generation's semantic branch.
Its appearance branch and the second generation are compared with what stands here: transformers' own SigLIP run whole,
and the projections written out tensor by tensor. Their public weights were not available to check against.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_jobs import DRIVER, ROOT
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from manifests.errors import FingerprintMismatch, InputError
from manifests.reader import open_manifest
from manifests.verify import verify
from tokenize_stage.config import DualTokenTokenizer, TokenSetConfig
from tokenize_stage.identity import describe
from tokenize_stage.job import run_job
from tokenize_stage.search import oracle
from tokenize_stage.tokenizers import load

DATA = ROOT / "tests" / "data" / "dualtoken_asvr"
GOLDEN = load_file(DATA / "tokenizer_golden.safetensors")
DEPTH, CODES, WIDTH, LAYERS, POSITIONS = 8, 64, 32, 24, 16
NARROW = 8
"""Width of a code vector in the made second-generation checkpoint."""

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden tokenizer in a folder that a test may change."""
    shutil.copytree(DATA, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def tokenizer(folder: Path = DATA, branch: str = "semantic", **changes: Any) -> DualTokenTokenizer:
    files = {"config": str(folder / "dualtoken_tiny_config.json"), "checkpoint": str(folder / "dualtoken_tiny.pt")}
    return DualTokenTokenizer.model_validate({**files, "branch": branch, **changes})


def loaded(config: DualTokenTokenizer, dtype: Any = "float32") -> Any:
    return load(config, describe(config).spec, dtype=dtype, device="cpu")


def views() -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(Image.open(DATA / "images" / f"{n}.png")) for n in range(4)]))


def golden_state() -> State:
    state: State = torch.load(DATA / "dualtoken_tiny.pt", weights_only=True)["state_dict"]
    return state


def edit_state(folder: Path, change: Callable[[State], Any]) -> None:
    state = golden_state()
    change(state)
    torch.save({"state_dict": state}, folder / "dualtoken_tiny.pt")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "dualtoken_tiny_config.json"
    config = json.loads(file.read_text())
    config["rqvaesiglip"].update(changes)
    config["rqvaesiglip"] = {key: value for key, value in config["rqvaesiglip"].items() if value is not None}
    file.write_text(json.dumps(config))


def hidden_states(state: State) -> tuple[torch.Tensor, ...]:
    """What transformers itself calls `hidden_states`, from the whole tower."""
    model = SiglipVisionModel(
        SiglipVisionConfig(**json.loads((DATA / "siglip-tiny/config.json").read_text())["vision_config"])
    )
    prefix = "siglip_model.vision_model."
    model.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    with torch.no_grad():
        pixels = (views().permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        states: tuple[torch.Tensor, ...] = model.eval()(pixels, output_hidden_states=True).hidden_states
    return states


def one_sentence(message: str) -> None:
    assert re.fullmatch(r"[^\n]{10,900}: [^\n]+[^.\n]", message)


# The numbers of the published code


def test_the_golden_codes_features_and_sums() -> None:
    found = loaded(tokenizer())
    features = found.encoder.features(views())
    torch.testing.assert_close(features, GOLDEN["hidden"], atol=5e-5, rtol=0)
    codes = found.encode(views())
    assert codes.dtype == torch.int32
    assert torch.equal(codes, GOLDEN["semantic_codes"].int())
    books = [torch.from_numpy(book) for book in found.codebooks()]
    assert [tuple(book.shape) for book in books] == [(CODES, WIDTH)] * DEPTH
    z_q = sum(book[codes[..., depth].long()] for depth, book in enumerate(books))
    torch.testing.assert_close(z_q, GOLDEN["z_q_semantic"], atol=1e-5, rtol=0)
    assert torch.equal(codes.flatten(0, 1), oracle(features.flatten(0, 1), found.codebooks()))


def test_the_spec_comes_from_the_configurations() -> None:
    spec = describe(tokenizer()).spec
    assert (spec.kind, spec.view_size, spec.grid, spec.code_dim, spec.residual) == (
        "dualtoken",
        56,
        (4, 4),
        WIDTH,
        True,
    )
    assert spec.codebook_sizes == (CODES,) * DEPTH
    assert set(spec.weights_sha256) == {"checkpoint", "config", "encoder_config"}
    assert (spec.settings["branch"], spec.settings["layer"]) == ("semantic", LAYERS - 1)


def test_codebooks_are_read_without_an_encoder() -> None:
    found = loaded(tokenizer())
    for alone, whole in zip(describe(tokenizer()).codebooks(), found.codebooks(), strict=True):
        np.testing.assert_array_equal(alone, whole)


def test_bfloat16_runs_and_agrees_mostly() -> None:
    codes = loaded(tokenizer(), "bfloat16").encode(views())
    assert (codes[..., 0] == GOLDEN["semantic_codes"][..., 0]).float().mean() > 0.8


# A whole job


def job(folder: Path, output: Path, **changes: Any) -> TokenSetConfig:
    values = {
        "source": {"kind": "folder", "path": DATA / "images"},
        "geometry": {"mode": "pad", "size": 56},
        "tokenizer": tokenizer(folder).model_dump(),
        "output": output,
        "unit_size": 3,
        "batch_size": 3,
        "torch_threads": 1,
        "device": "cpu",
    }
    return TokenSetConfig.model_validate({**values, **changes})


def test_from_png_files_to_golden_codes_and_a_rerun_without_torch(folder: Path, tmp_path: Path, cache: Path) -> None:
    config = job(folder, tmp_path / "out")
    result = run_job(config)
    assert result.manifest.geometry.background == (127, 127, 127)
    assert verify(tmp_path / "out").problems == []
    opened = open_manifest(tmp_path / "out")
    codes = opened.read_codes([f"{number}.png" for number in range(4)])
    np.testing.assert_array_equal(np.stack(codes)[:, 0], GOLDEN["semantic_codes"].numpy())
    for book, own in zip(opened.codebooks(), describe(tokenizer()).codebooks(), strict=True):
        np.testing.assert_array_equal(book, own)

    code = f"{DRIVER}\nprint(result.plan, sorted({{'torch', 'ray', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, config.model_dump_json()],
        capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "ASVR_CACHE": str(cache)},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["encoded 0", "None []"]

    entry = next((cache / "specs").iterdir())
    for damaged in (b"{", entry.read_bytes().replace(b'"code_dim": 32', b'"code_dim": 16')[:-3], b"[]"):
        entry.write_bytes(damaged)
        assert run_job(config).encoded == 0


def test_another_branch_in_the_same_output_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    run_job(job(folder, tmp_path / "out"))
    with pytest.raises(FingerprintMismatch, match="branch"):
        run_job(job(folder, tmp_path / "out", tokenizer=tokenizer(folder, "appearance").model_dump()))


def test_moving_the_files_changes_only_the_origin(folder: Path) -> None:
    here, there = describe(tokenizer()).spec, describe(tokenizer(folder)).spec
    assert here.origin != there.origin
    assert here == there.model_copy(update={"origin": here.origin})


def test_a_checkpoint_that_changed_after_planning_is_refused(folder: Path) -> None:
    spec = describe(tokenizer(folder)).spec
    edit_state(folder, lambda state: state["quantizer_semantic.codebooks.0.weight"].add_(1))
    with pytest.raises(InputError, match="changed while the job ran"):
        load(tokenizer(folder), spec, dtype="float32", device="cpu")


def test_views_of_another_size_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="set geometry.size to 56"):
        run_job(job(folder, tmp_path / "out", geometry={"mode": "squash", "size": 64}))


# The first generation's other branch, and shared codebooks


def conv_block(state: State, x_BPn: torch.Tensor) -> torch.Tensor:
    def weights(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return state[f"prequant_visual.{name}.weight"].float(), state[f"prequant_visual.{name}.bias"].float()

    x = x_BPn.permute(0, 2, 1).reshape(len(x_BPn), WIDTH, 4, 4)
    h = F.conv2d(F.silu(F.group_norm(x, 32, *weights("norm1"), eps=1e-6)), *weights("conv1"))
    h = F.conv2d(F.silu(F.group_norm(h, 32, *weights("norm2"), eps=1e-6)), *weights("conv2"), padding=1)
    return (x + h).reshape(len(x_BPn), WIDTH, POSITIONS).permute(0, 2, 1)


def rows(state: State, quantizer: str, depth: int = DEPTH) -> list[Any]:
    return [state[f"{quantizer}.codebooks.{d}.weight"][:-1].float().numpy() for d in range(depth)]


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


# The second generation


def projection(prefix: str, width: int, out: int) -> State:
    shapes = {
        "norm1.weight": (width,), "norm1.bias": (width,), "norm3.weight": (width,), "norm3.bias": (width,),
        "norm2.weight": (out,), "norm2.bias": (out,), "proj.weight": (out, width), "proj.bias": (out,),
        "attn.qkv.weight": (3 * max(width, out), width), "attn.q_bias": (max(width, out),), "attn.v_bias": (max(width, out),),
        "attn.zero_k_bias": (max(width, out),), "attn.proj.weight": (out, out), "attn.proj.bias": (out,),
        "mlp.norm.weight": (out,), "mlp.norm.bias": (out,), "mlp.w0.weight": (2 * out, out), "mlp.w0.bias": (2 * out,),
        "mlp.w1.weight": (2 * out, out), "mlp.w1.bias": (2 * out,), "mlp.w2.weight": (out, 2 * out), "mlp.w2.bias": (out,),
    }  # fmt: skip
    state = {f"{prefix}.{name}": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    state[f"{prefix}.attn.zero_k_bias"].zero_()
    return state


@pytest.fixture
def second(folder: Path) -> Path:
    """A made checkpoint in the layout of the second generation, on the golden SigLIP."""
    torch.manual_seed(5)
    state = {key: value.float() for key, value in golden_state().items() if key.startswith(("siglip_model", "decoder"))}
    for name in ("sem", "pix"):
        state |= projection(f"prequant_{name}", WIDTH, NARROW) | projection(f"postquant_{name}", NARROW, WIDTH)
        book = torch.randn(CODES + 1, NARROW)
        state |= {f"quantizer_{name}.codebooks.{depth}.weight": book for depth in range(4)}
        state |= {f"quantizer_{name}.codebooks.{depth}.embed_ema": 3 * book[:-1] for depth in range(4)}
        state |= {f"quantizer_{name}.codebooks.{depth}.cluster_size_ema": torch.ones(CODES) for depth in range(4)}
    state |= projection("prequant_shortcut", WIDTH, NARROW)
    torch.save({"state_dict": state}, folder / "dualtoken_tiny.pt")
    quantizer = {
        "bottleneck_type": "rq_ema", "code_shape": [4, 4, 4], "latent_shape": [4, 4, NARROW], "embed_dim": NARROW,
        "n_embed": CODES, "shared_codebook": True,
    }  # fmt: skip
    edit_config(
        folder, vq_sem=quantizer, vq_pix=quantizer, layer_sem=LAYERS - 1, layer_recon=6, layer_shortcut=4,
        weight_shortcut=0.6, embed_dim=None, n_embed=None, code_shape=None, latent_shape=None, shared_codebook=None,
    )  # fmt: skip
    return folder


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


# Files of the wrong generation


def test_a_checkpoint_of_the_other_generation_is_refused(second: Path, tmp_path: Path) -> None:
    newer, older = str(second / "dualtoken_tiny.pt"), str(DATA / "dualtoken_tiny.pt")
    with pytest.raises(InputError, match="is of generation 2, but its configuration .* is of generation 1") as error:
        describe(tokenizer(checkpoint=newer))
    one_sentence(str(error.value))
    with pytest.raises(InputError, match="is of generation 1, but its configuration .* is of generation 2") as error:
        describe(tokenizer(second, checkpoint=older))
    one_sentence(str(error.value))


@pytest.mark.parametrize("extra", ["quantizer_pixel.codebooks.0.weight", "prequant_semantic.conv1.weight"])
def test_generations_nobody_published_weights_of_are_refused(folder: Path, extra: str) -> None:
    edit_state(folder, lambda state: state.update({extra: torch.ones(1)}))
    with pytest.raises(InputError, match=f"not supported .*{extra.split('.')[0]}") as error:
        describe(tokenizer(folder))
    one_sentence(str(error.value))


# Damaged and foreign files


def put(key: str, value: torch.Tensor | None) -> Callable[[State], Any]:
    def change(state: State) -> None:
        state.pop(key, None)
        if value is not None:
            state[key] = value

    return change


def rename(state: State) -> None:
    key = "siglip_model.vision_model.encoder.layers.3.mlp.fc1.weight"
    state[key.replace("fc1", "linear1")] = state.pop(key)


def prefix(state: State) -> None:
    for key in list(state):
        state[f"module.{key}"] = state.pop(key)


BOOK = "quantizer_semantic.codebooks.2.weight"

BAD_STATES: dict[str, tuple[Callable[[State], Any], str]] = {
    "renamed key": (rename, r"lacks 1 of .*layers\.3\.mlp\.fc1\.weight\), and holds 1 .*layers\.3\.mlp\.linear1\.weight"),
    "missing codebook": (put(BOOK, None), r"lacks 1 of the \d+ tensors needed \(quantizer_semantic\.codebooks\.2\.weight\)"),
    "deeper than configured": (put("quantizer_semantic.codebooks.8.weight", torch.ones(1)), r"codebooks\.8\.weight; ignored: text tower"),
    "without padding row": (put(BOOK, torch.ones(CODES, WIDTH)), r"is \(64, 32\), not \(65, 32\)"),
    "integers": (put(BOOK, torch.ones(CODES + 1, WIDTH, dtype=torch.int32)), "not floating point"),
    "unknown tensor": (put("surprise", torch.ones(1)), r"\(surprise; ignored"),
    "prefixed": (prefix, "holds no semantic quantiser .*module"),
    "no quantiser": (lambda state: [state.pop(key) for key in list(state) if key.startswith("quant")], "no semantic quantiser"),
    "layer beyond the encoder": (
        put("siglip_model.vision_model.encoder.layers.24.mlp.fc1.weight", torch.ones(1)), r"layers\.24"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_checkpoint_with_wrong_tensors_is_refused_before_a_job_is_planned(
    folder: Path, tmp_path: Path, name: str
) -> None:
    change, match = BAD_STATES[name]
    edit_state(folder, change)
    with pytest.raises(InputError, match=match) as error:
        run_job(job(folder, tmp_path / "out"))
    one_sentence(str(error.value))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=match):  # an error is not remembered as an answer
        describe(tokenizer(folder))


@pytest.mark.parametrize("key", [BOOK, "siglip_model.vision_model.encoder.layers.5.mlp.fc1.bias"])
def test_a_checkpoint_with_nan_is_refused(folder: Path, tmp_path: Path, key: str) -> None:
    edit_state(folder, lambda state: state[key].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(InputError, match=rf"NaN or infinity in 1 tensors \({re.escape(key)}\)") as error:
        run_job(job(folder, tmp_path / "out"))
    one_sentence(str(error.value))


def test_nan_in_what_is_not_used_does_no_harm(folder: Path) -> None:
    edit_state(folder, lambda state: state["decoder.conv_in.bias"].fill_(float("nan")))
    assert torch.equal(loaded(tokenizer(folder)).encode(views()), GOLDEN["semantic_codes"].int())


def test_a_truncated_checkpoint_is_refused(folder: Path) -> None:
    file = folder / "dualtoken_tiny.pt"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="is cut off") as error:
        describe(tokenizer(folder))
    one_sentence(str(error.value))


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "wrong depth": (
        {"code_shape": [4, 4, 4]},
        r"codebooks\.4\.weight, .*neither needed|neither needed .*codebooks\.4\.weight",
    ),
    "deeper": ({"code_shape": [4, 4, 9]}, r"lacks 1 .*codebooks\.8\.weight"),
    "other K": ({"n_embed": 128}, r"is \(65, 32\), not \(129, 32\)"),
    "other width": ({"embed_dim": 16, "latent_shape": [4, 4, 16]}, "embed_dim is 16, but the features .* are 32 wide"),
    "other grid": ({"code_shape": [3, 3, 8], "latent_shape": [3, 3, 32]}, r"grid of \(3, 3\) .* makes \(4, 4\)"),
    "latent shape": ({"latent_shape": [8, 8, 32]}, "latent_shape is"),
    "no depth": ({"code_shape": None}, "code_shape is missing"),
    "list of K": ({"n_embed": [64] * 7}, "n_embed is .*8 positive integers"),
    "K is text": ({"n_embed": "64"}, "n_embed is '64'"),
    "between generations": ({"vq_semantic": {}}, "between DualToken's two generations"),
    "no encoder": ({"pretrained_model": None}, "names no pretrained_model: set encoder_config"),
    "encoder elsewhere": (
        {"pretrained_model": "$PATH/siglip"},
        r"names the encoder \$PATH/siglip, which cannot be found",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_wrong_configuration_is_refused(folder: Path, name: str) -> None:
    changes, match = BAD_CONFIGS[name]
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=match) as error:
        describe(tokenizer(folder))
    one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_attention_heads": 5}, "is not the configuration of a SigLIP"),
        ({"hidden_act": "nothing"}, "is not the configuration of a SigLIP"),
        ({"num_hidden_layers": 12}, r"layers\.23|neither needed"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is '0'"),
        ({"image_size": [56, 56]}, "image_size is"),
        ({"hidden_size": 64}, "embed_dim is 32, but the features"),
        ({"intermediate_size": 48}, "another shape"),
    ],
)
def test_a_wrong_encoder_configuration_is_refused(folder: Path, changes: dict[str, Any], match: str) -> None:
    file = folder / "siglip-tiny" / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"].update(changes)
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=match) as error:
        describe(tokenizer(folder))
    one_sentence(str(error.value))


def test_the_encoder_configuration_may_be_named_in_the_recipe(folder: Path) -> None:
    shutil.move(folder / "siglip-tiny", folder / "elsewhere")
    for reference in (folder / "elsewhere", folder / "elsewhere" / "config.json"):
        spec = describe(tokenizer(folder, encoder_config=str(reference))).spec
        assert spec.weights_sha256 == describe(tokenizer()).spec.weights_sha256
    other = folder / "clip.json"
    other.write_text(json.dumps({"model_type": "clip", "vision_config": {}}))
    with pytest.raises(InputError, match="configuration of a clip model"):
        describe(tokenizer(folder, encoder_config=str(other)))


def test_states_are_not_changed_by_reading(folder: Path) -> None:
    before = copy.deepcopy((folder / "dualtoken_tiny.pt").read_bytes())
    loaded(tokenizer(folder)).encode(views())
    assert (folder / "dualtoken_tiny.pt").read_bytes() == before
