"""An export says what it was made from and tells no secrets; it goes to the Hub through the real client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run
import yaml
from hub_server import HubServer
from tiny_models import save_language_model, save_tower
from typer.testing import CliRunner

from manifests.hashes import file_sha256
from manifests.reader import open_manifest
from pipeline import launch
from pipeline.cli import app
from pipeline.model_card import is_hub_id, licence_of, licence_of_tokenizer
from train_stage import checkpoint as checkpoints
from train_stage.config import ModelConfig, TrainConfig
from train_stage.prepare import prepare, trainable_names
from train_stage.tensor_files import save_tensors

SECRET = "sk-do-not-tell-0123456789"  # noqa: S105 - opens nothing


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose language model has a card, and whose settings hold a secret."""
    folder = tmp_path_factory.mktemp("private-home")
    save_tower("siglip", folder / "tower")
    save_language_model(folder / "lm", tied=False)
    (folder / "lm" / "README.md").write_text("---\nlicense: llama2\n---\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASVR_CACHE", str(folder / "cache"))
        patch.setenv("HF_TOKEN", SECRET)
        model = ModelConfig(language_model=str(folder / "lm"), vision_tower=str(folder / "tower"))
        values = tiny_run.make_config(folder, model).model_dump(mode="json")
        values["deepspeed"] = {"wandb": {"enabled": False, "team": SECRET}}
        values["phases"] = values["phases"][1:]
        config = TrainConfig.model_validate(values)
        prepared = prepare(config, config.phase("instruct"))
        launch.write_config(config)
        phase = config.phase_folder("instruct")
        unfinished = phase / checkpoints.unfinished_name(6)
        unfinished.mkdir(parents=True)
        own = dict(prepared.model.named_parameters())
        weights = {name: own[name].detach().clone() for name in trainable_names(prepared.model)}
        save_tensors(weights, unfinished / checkpoints.WEIGHTS)
        settings = checkpoints.settings_of(config, "instruct")
        checkpoints.commit(phase, 6, final=True, world=1, settings=settings, config=config, keep_last=1)
        lines = [
            {"step": 6, "loss": 1.5, "text_loss": 1.0, "visual_loss": 0.5, "grad_norm": 1.0},
            {"kind": "validation", "step": 6, "loss": 2.5, "objectives": {"codes": {"accuracy_depth": [0.25, 0.125]}}},
        ]
        (phase / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert CliRunner().invoke(app, ["export", config.output], catch_exceptions=False).exit_code == 0
        yield Path(config.output)


def test_the_card_says_what_it_was_made_from(run: Path) -> None:
    card = (run / "export" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["pipeline_tag"], front["license"]) == (
        "transformers",
        "image-text-to-text",
        "other",
    )
    folder = run.parent
    assert file_sha256(folder / "talks.json") in card
    assert open_manifest(folder / "tokens").manifest.fingerprint in card
    assert "1 x codes (codes)" in card
    assert "| instruct, validation at step 6 | objectives.codes.accuracy_depth | 0.25, 0.125 |" in card
    assert "| instruct, training at step 6 | loss | 1.5 |" in card
    assert "| language model | `lm` | `llama2` |" in card
    assert "| vision tower | `tower` | `not known here: see where it came from` |" in card
    assert "| transformers |" in card


def test_the_card_tells_no_secret_and_no_place(run: Path) -> None:
    for path in (run / "export").iterdir():
        assert SECRET.encode() not in path.read_bytes(), path.name
    assert "private-home" not in (run / "export" / "README.md").read_text()


def test_licences_that_are_known() -> None:
    assert licence_of("lmsys/vicuna-7b-v1.5") == "llama2"
    assert licence_of("someone/else").startswith("not known here")
    assert licence_of_tokenizer("vila_u") == "MIT"
    assert [is_hub_id(text) for text in ("a/b", "/a/b", "./a", "a")] == [True, False, False, False]


def test_an_export_goes_to_the_hub(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as hub:
        push_by_command(hub, run, tmp_path)
        files = hub.repositories["models/someone/llava"]
        here = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
        assert {name: files[name] for name in here} == here
        assert "access is denied" in push_by_command(hub, run, tmp_path, code=10, HF_TOKEN="hf_wrong")  # noqa: S106
        assert "is not the name of a repository" in push_by_command(hub, run, tmp_path, "no/such/name", code=4)


def push_by_command(
    hub: HubServer, run: Path, home: Path, repo: str = "someone/llava", code: int = 0, **more: str
) -> str:
    import os
    import subprocess
    import sys

    found = subprocess.run(
        [sys.executable, "-m", "pipeline", "export", str(run), "--push-to-hub", repo],
        capture_output=True, text=True, timeout=120,
        env=os.environ | hub.environment | {"HF_HOME": str(home), "ASVR_CACHE": str(home)} | more,
    )  # fmt: skip
    assert found.returncode == code, found.stderr
    return found.stderr.splitlines()[-1] if code else found.stdout
