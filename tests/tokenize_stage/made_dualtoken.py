"""The golden DualToken tokenizer (`tests/data/dualtoken_asvr`), and ways to change it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_jobs import ROOT
from PIL import Image
from safetensors.torch import load_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from tokenize_stage.config import DualTokenTokenizer, TokenSetConfig
from tokenize_stage.identity import describe
from tokenize_stage.tokenizers import load

DATA = ROOT / "tests" / "data" / "dualtoken_asvr"
GOLDEN = load_file(DATA / "tokenizer_golden.safetensors")
DEPTH, CODES, WIDTH, LAYERS, POSITIONS = 8, 64, 32, 24, 16
NARROW = 8
"""Width of a code vector in the made second-generation checkpoint."""

State = dict[str, torch.Tensor]


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


def rows(state: State, quantizer: str, depth: int = DEPTH) -> list[Any]:
    return [state[f"{quantizer}.codebooks.{d}.weight"][:-1].float().numpy() for d in range(depth)]


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


def make_second_generation(folder: Path) -> None:
    """Put a made checkpoint in the layout of the second generation, on the golden SigLIP, into a tokenizer's folder."""
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
