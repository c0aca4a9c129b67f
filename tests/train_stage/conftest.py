"""Fixtures of the training tests: tiny models on disk, and the numbers of the released code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TOWERS, save_language_model, save_tower

from train_stage.config import HeadConfig, ModelConfig
from train_stage.deepspeed_process import prepare_environment
from train_stage.ranks import Ranks, join_ranks, leave_ranks
from train_stage.visual_head import VisualHead


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `siglip clip dinov2 vit` towers and `llama llama_tied` language models."""
    folder = tmp_path_factory.mktemp("tiny")
    for kind in TOWERS:
        save_tower(kind, folder / kind)
    save_language_model(folder / "llama", tied=False)
    save_language_model(folder / "llama_tied", tied=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums are split by threads: losses of one process are compared with those of several, which have one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """This process as the only rank. One for the session: DeepSpeed does not let a process join a second time."""
    prepare_environment()
    yield join_ranks(60)
    leave_ranks()


@pytest.fixture(scope="session")
def tiny_model(tiny_folders: Path) -> Callable[..., ModelConfig]:
    """Makes the configuration of a tiny model: `tiny_model("clip", tied=True)`."""

    def make(kind: str = "siglip", *, tied: bool = False) -> ModelConfig:
        return ModelConfig(
            language_model=str(tiny_folders / ("llama_tied" if tied else "llama")),
            vision_tower=str(tiny_folders / kind),
        )

    return make


GOLDEN = Path(__file__).parents[1] / "data" / "asvr_golden"


class AsvrGolden:
    """Weights, inputs and outputs of the released ASVR code for a tiny model, in float32.

    `rename` maps the release's parameter names to those of `train_stage.model.AsvrModel`.
    """

    def __init__(self) -> None:
        self.weights = {k: v.float() for k, v in load_file(GOLDEN / "weights.safetensors").items()}
        self.tower = {k: v.float() for k, v in load_file(GOLDEN / "tower_and_codebooks.safetensors").items()}
        self.tensors = load_file(GOLDEN / "model_golden.safetensors")
        self.numbers: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())
        self.codebooks = [self.tower.pop(f"codebooks.{d}").numpy() for d in range(self.numbers["depth"])]
        self.head = HeadConfig(
            width=self.numbers["head_embed_dim"],
            layers=self.numbers["head_layers"],
            heads=self.numbers["head_num_heads"],
            ffn=256,
        )

    def rename(self, name: str) -> str | None:
        """None for the biases that the release allocates and never uses."""
        name = name.removeprefix("model.vision_tokenizer.vision_tower.")
        if ".linear" in name:
            if name.endswith(".bias"):
                return None
            name = name.replace("linear1.weight", "feed_forward.up_DWF")
            name = name.replace("linear2.weight", "feed_forward.down_DFW")
        for old, new in (
            ("rqtransformer_semantic.in_mlp_1", "objectives.codes.visual_head.code_proj"),
            ("rqtransformer_semantic.head_transformer", "objectives.codes.visual_head.blocks"),
            ("rqtransformer_semantic.headnorm", "objectives.codes.visual_head.norm"),
            ("rqtransformer_semantic.heads", "objectives.codes.visual_head.classifiers"),
            ("self_attention.in_proj_", "attention.in_proj."),
            ("self_attention.", "attention."),
            ("layernorm", "norm"),
            ("model.mm_projector.0", "llava.model.multi_modal_projector.linear_1"),
            ("model.mm_projector.2", "llava.model.multi_modal_projector.linear_2"),
        ):
            name = name.replace(old, new) if "input_layer" not in name and "post_att" not in name else name
        if name.startswith("projector."):
            return f"objectives.codes.visual_head.{name}"
        if name.startswith("model."):
            return f"llava.model.language_model.{name.removeprefix('model.')}"
        return f"llava.{name}" if name.startswith("lm_head") else name

    def trainable(self) -> dict[str, torch.Tensor]:
        """The released weights under this project's names; feed-forward weights cut into one matrix per depth."""
        depth, renamed = self.numbers["depth"], {}
        for name, tensor in self.weights.items():
            new = self.rename(name)
            if new is None:
                continue
            if "feed_forward" in new:  # (out, depth * in) -> (depth, in, out)
                tensor = tensor.view(tensor.shape[0], depth, -1).permute(1, 2, 0).contiguous()
            renamed[new] = tensor
        return renamed

    def visual_head(self) -> VisualHead:
        head = VisualHead(self.numbers["llama_config"]["hidden_size"], self.head, self.codebooks)
        prefix = "objectives.codes.visual_head."
        head.load_state_dict({k.removeprefix(prefix): v for k, v in self.trainable().items() if k.startswith(prefix)})
        return head


@pytest.fixture(scope="session")
def asvr_golden() -> AsvrGolden:
    return AsvrGolden()
