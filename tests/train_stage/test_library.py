"""The objective outside this package's own loop."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import tiny_set
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from manifests.errors import InputError
from train_stage.batch import IGNORE
from train_stage.build import build_model
from train_stage.library import VisualCodesLoss
from train_stage.objective_config import CodesObjective
from train_stage.ranks import Ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "huggingface_trainer.py"
PICTURES, POSITIONS = 4, 16


@pytest.fixture
def loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VisualCodesLoss:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    ids = tiny_set.save_pictures(tmp_path / "images", PICTURES)
    tiny_set.save_manifest(tmp_path / "tokens", tmp_path / "images", ids)
    settings = CodesObjective.model_validate({"head": tiny_run.HEAD})
    torch.manual_seed(0)
    return VisualCodesLoss([tmp_path / "tokens"], 32, settings)


def test_it_starts_at_ln_k_and_is_zero_without_images(loss: VisualCodesLoss) -> None:
    hidden = torch.randn(2, 20, 32)
    positions = torch.stack([torch.arange(POSITIONS), 20 + torch.arange(POSITIONS)])
    value = loss(hidden, positions, ["p001.png", "p003.png"])
    assert value.item() == pytest.approx(math.log(12), rel=0.05)
    nothing = loss(hidden, positions[:0], [])
    nothing.backward()
    assert nothing.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in loss.parameters())
    with pytest.raises(InputError, match=r"no codes of p009\.png"):
        loss(hidden, positions, ["p001.png", "p009.png"])


@pytest.fixture
def example() -> Any:
    spec = importlib.util.spec_from_file_location("huggingface_trainer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def samples_of(llava: Any) -> list[dict[str, Any]]:
    ids = torch.cat([torch.full((POSITIONS,), llava.config.image_token_id), torch.arange(3, 9)])
    labels = torch.cat([torch.full((POSITIONS,), IGNORE), torch.arange(3, 9)])
    return [
        {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(3, 28, 28), "image_id": f"p{n:03}.png"}
        for n in range(PICTURES)
    ]


def test_the_example_trains_under_the_hugging_face_trainer(
    loss: VisualCodesLoss, example: Any, tiny_model: Any, ranks: Ranks, tmp_path: Path
) -> None:
    """`Trainer` itself, in a process group as on several GPUs: the loss falls, and model and head learn."""
    llava = build_model(tiny_model(), (), {}, torch.float32).llava
    llava.model.vision_tower.requires_grad_(False)
    model = example.LlavaWithCodes(llava, loss)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"),
        per_device_train_batch_size=2,
        num_train_epochs=4,
        learning_rate=1e-2,
        logging_steps=1,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=samples_of(llava), data_collator=example.collate)
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 8
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in logged)
    assert logged[-1]["loss"] < logged[0]["loss"]
    learned = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if name.startswith("visual_loss.")} <= learned, "every parameter of the head"
    assert any("language_model" in name for name in learned)
    assert any("multi_modal_projector" in name for name in learned)
    assert not any("vision_tower" in name for name in learned)
    llava.save_pretrained(tmp_path / "trained")
    assert not any("visual" in name for name in load_file(tmp_path / "trained" / "model.safetensors"))


def test_its_loss_is_text_and_visual_loss(loss: VisualCodesLoss, example: Any, tiny_model: Any) -> None:
    llava = build_model(tiny_model(), (), {}, torch.float32).llava
    found = example.LlavaWithCodes(llava, loss)(**example.collate(samples_of(llava)))
    assert found["visual_loss"].item() == pytest.approx(math.log(12), rel=0.05), "starts at ln K"
    assert found["loss"].item() == pytest.approx(found["text_loss"].item() + found["visual_loss"].item(), rel=1e-6)
