"""`asvr eval` measures a run and an export alike, keeps what was said, and hands an export to lmms-eval."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import tiny_set
from tiny_models import save_language_model, save_tower
from typer.testing import CliRunner

from manifests.errors import InputError
from pipeline import evaluation, launch
from pipeline.cli import app
from pipeline.lmms_eval import TASKS, command
from train_stage import checkpoint as checkpoints
from train_stage.config import ModelConfig, TrainConfig
from train_stage.prepare import prepare, trainable_names
from train_stage.tensor_files import save_tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stands at the end of its only phase, with validation data; untrained, which evaluation does not mind."""
    folder = tmp_path_factory.mktemp("evaluated")
    save_tower("siglip", folder / "tower")
    save_language_model(folder / "lm", tied=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASVR_CACHE", str(folder / "cache"))
        model = ModelConfig(language_model=str(folder / "lm"), vision_tower=str(folder / "tower"))
        values = tiny_run.make_config(folder, model).model_dump(mode="json")
        ids = tiny_set.save_pictures(folder / "held_out", 4, seed=9)
        tiny_set.save_manifest(folder / "held_out_tokens", folder / "held_out", ids, code_seed=5)
        records = tiny_set.save_records(folder / "held_out.json", ids, text_only=2)
        assert len(records) == 6
        held_out = {"path": str(folder / "held_out.json"), "image_root": str(folder / "held_out")}
        values["phases"] = values["phases"][1:]
        values["phases"][0]["validation"] = {"data": [held_out], "manifests": [str(folder / "held_out_tokens")]}
        config = TrainConfig.model_validate(values)
        prepared = prepare(config, config.phase("instruct"))
        launch.write_config(config)
        unfinished = config.phase_folder("instruct") / checkpoints.unfinished_name(6)
        unfinished.mkdir(parents=True)
        own = dict(prepared.model.named_parameters())
        names = trainable_names(prepared.model)
        save_tensors({name: own[name].detach().clone() for name in names}, unfinished / checkpoints.WEIGHTS)
        settings = checkpoints.settings_of(config, "instruct")
        checkpoints.commit(
            config.phase_folder("instruct"), 6, final=True, world=1, settings=settings, config=config, keep_last=1
        )
        launch.export(Path(config.output))
        yield Path(config.output)


def measured(*arguments: str | Path) -> dict[str, Any]:
    found = CliRunner().invoke(app, ["eval", *map(str, arguments), "--json"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def test_a_run_gives_losses_by_depth_and_answers(run: Path) -> None:
    found = measured(run)
    assert (found["phase"], found["step"], found["final"]) == ("instruct", 6, True)
    codes = found["losses"]["objectives"]["codes"]
    assert codes["loss_depth"] == pytest.approx([math.log(12)] * 2, rel=0.1)
    assert len(codes["accuracy_depth"]) == 2
    assert found["losses"]["samples"] == 6
    lines = [json.loads(line) for line in (run / "eval" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == found["questions"] == 1 + 2 + 3 + 1
    assert found["records_not_asked"] == 2, "those without a picture"
    assert set(lines[0]) == {"image", "question", "expected", "answer", "correct"}
    assert "<image>" not in lines[0]["question"]
    assert found["accuracy"] == sum(line["correct"] for line in lines) / len(lines)
    assert json.loads((run / "eval" / "results.json").read_text()) == found


def test_its_export_answers_the_same(run: Path, tmp_path: Path) -> None:
    folder = run.parent
    held_out = ("--data", folder / "held_out.json", "--image-root", folder / "held_out")
    of_run = measured(run, "--out", tmp_path / "run", *held_out, "--manifest", folder / "held_out_tokens")
    of_export = measured(run / "export", "--out", tmp_path / "export", *held_out)
    assert of_export["accuracy"] == of_run["accuracy"]
    answers = [(tmp_path / name / "answers.jsonl").read_text() for name in ("run", "export")]
    assert answers[0] == answers[1]
    assert measured(run / "export", "--out", tmp_path / "few", *held_out, "--limit", "2")["questions"] == 2


def test_people_get_a_table(run: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["eval", str(run), "--out", str(tmp_path / "x")]).stdout
    assert "codes: codes found by depth" in said
    assert "answered exactly" in said


def test_without_held_out_data_there_is_a_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="remembers no held-out data: give --data and --image-root"):
        evaluation.evaluate(run / "export", evaluation.Asked())
    with pytest.raises(InputError, match="the held-out records nowhere"):
        evaluation.evaluate(run / "export", evaluation.Asked((("nowhere.json", "."),)))
    found = CliRunner().invoke(app, ["eval", str(run), "--data", "x.json"])
    assert found.exit_code == 2


def test_the_command_for_lmms_eval(run: Path, tmp_path: Path) -> None:
    words = shlex.split(command(run / "export", tmp_path / "a b"))
    assert words[:6] == ["python", "-m", "lmms_eval", "--model", "llava_hf", "--model_args"]
    assert words[6] == f"pretrained={(run / 'export').resolve()},device_map=auto"
    assert words[words.index("--tasks") + 1].split(",") == list(TASKS.values())
    assert words[words.index("--output_path") + 1] == str(tmp_path / "a b")
    many = shlex.split(command(run / "export", tmp_path, processes=8))
    assert many[:5] == ["accelerate", "launch", "--num_processes=8", "-m", "lmms_eval"]
    assert f"pretrained={(run / 'export').resolve()}" in many
    said = CliRunner().invoke(app, ["eval", str(run / "export"), "--lmms-eval"]).stdout
    assert shlex.split(said)[:3] == words[:3]
    with pytest.raises(InputError, match="is no exported model"):
        command(tmp_path, tmp_path)
    strange = tmp_path / "a,b"
    strange.mkdir()
    (strange / "preprocessor_config.json").write_text("{}")
    with pytest.raises(InputError, match="lmms-eval cannot read a path with one of"):
        command(strange, tmp_path)


@pytest.mark.parametrize("content", ["text", "parts"])
def test_lmms_eval_s_messages_become_the_prompt_of_training(run: Path, content: str) -> None:
    """Its class for chats gives parts, the older one a text that begins with the image token (both read 2026-11-28)."""
    from transformers import AutoProcessor

    from train_stage.evaluate import prompt

    processor = AutoProcessor.from_pretrained(run / "export", backend="pil")
    question = "what is it?\nAnswer the question using a single word or phrase."
    if content == "parts":
        message: Any = [{"type": "image", "url": "x"}, {"type": "text", "text": question}]
        found = processor.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
    else:
        found = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"<image>\n{question}"}], tokenize=False, add_generation_prompt=True
        )
    assert found == prompt(processor, question)
