"""A run's newest checkpoint becomes a model again, and an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import target
from tiny_set import save_manifest, save_pictures

from manifests.errors import InputError
from manifests.reader import open_manifest
from manifests.schema import Geometry
from train_stage import checkpoint as checkpoints
from train_stage import config as configs
from train_stage.build import build_model
from train_stage.evaluate import Question, answer_questions, load_exported
from train_stage.export import HEAD_FILE, export_llava, make_processor
from train_stage.trained import load_trained

HEAD = configs.HeadConfig(width=16, layers=1, heads=2, ffn=16)


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., configs.ModelConfig]) -> configs.TrainConfig:
    """A run of two phases whose second one stands at step 3."""
    ids = save_pictures(tmp_path / "images", 3)
    save_manifest(tmp_path / "tokens", tmp_path / "images", ids)
    data = (configs.DataConfig(path="unused.json", image_root=str(tmp_path / "images")),)
    codes = configs.CodesObjective(head=HEAD)
    manifests = (str(tmp_path / "tokens"),)
    config = configs.TrainConfig(
        output=str(tmp_path / "run"),
        precision="float32",
        model=tiny_model(),
        phases=tuple(
            configs.PhaseConfig(name=name, data=data, manifests=manifests, objective=codes)
            for name in ("pretrain", "instruct")
        ),
    )
    for name, step, seed in (("pretrain", 2, 11), ("instruct", 1, 12), ("instruct", 3, 13)):
        codebooks = open_manifest(tmp_path / "tokens").codebooks()
        model = build_model(config.model, (codes,), {"codes": target(codebooks)}, torch.float32, seed=seed)
        folder = config.phase_folder(name) / checkpoints.unfinished_name(step)
        folder.mkdir(parents=True)
        weights = {k: v.detach().clone() for k, v in model.named_parameters() if "projector" in k or "objective" in k}
        save_file(weights, folder / checkpoints.WEIGHTS)
        checkpoints.commit(
            config.phase_folder(name), step, final=False, world=1, settings={}, config=config, keep_last=5
        )
    return config


def test_the_newest_checkpoint_of_the_last_phase_is_loaded(run: configs.TrainConfig, tmp_path: Path) -> None:
    trained = load_trained(run)
    assert (trained.phase.name, trained.step, trained.final) == ("instruct", 3, False)
    codebooks = open_manifest(tmp_path / "tokens").codebooks()
    expected = build_model(
        run.model, run.phases[1].terms, {"codes": target(codebooks)}, torch.float32, seed=13
    ).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained.model.state_dict().items())
    assert trained.geometry == Geometry(mode="pad", size=28)
    first_phase = run.model_copy(update={"phases": run.phases[:1]})
    assert (load_trained(first_phase).phase.name, load_trained(first_phase).step) == ("pretrain", 2)


def test_its_export_answers_as_it_does(run: configs.TrainConfig, tmp_path: Path) -> None:
    trained = load_trained(run)
    export_llava(
        trained.model,
        trained.tokenizer,
        trained.geometry,
        tmp_path / "export",
        chat_template=trained.chat_template,
        stop_tokens=trained.stop_tokens,
    )
    assert trained.stop_tokens == [trained.tokenizer.eos_token_id]
    processor = make_processor(trained.model, trained.tokenizer, trained.geometry, trained.chat_template)
    questions = [Question(path, "what is it?", "red") for path in sorted((tmp_path / "images").iterdir())]
    ours = answer_questions(trained.model.llava, processor, questions, max_new_tokens=4)
    theirs = answer_questions(*load_exported(tmp_path / "export"), questions, max_new_tokens=4)
    assert ours == theirs
    with safe_open(tmp_path / "export" / HEAD_FILE, "pt") as file:
        codebook = json.loads((tmp_path / "tokens" / "manifest.json").read_text())["codebook"]
        assert json.loads(file.metadata()["objectives"])["codes"]["codebook_sha256"] == codebook["sha256"]


def test_an_untrained_run_is_one_sentence(run: configs.TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train first"):
        load_trained(run.model_copy(update={"output": str(tmp_path / "other")}))
