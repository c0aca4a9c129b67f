"""Held-out losses are those of training, and looking at them changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import tiny_set
import torch

from manifests.errors import InputError, TrainingStopped
from train_stage.checkpoint import newest, settings_of
from train_stage.config import TrainConfig
from train_stage.loop import draw_seed
from train_stage.phase_data import load_data
from train_stage.prepare import Prepared, prepare
from train_stage.ranks import Ranks
from train_stage.run import is_due, run_phase
from train_stage.stopping import Stopper
from train_stage.validation import DRAWS, validate, validation_tables

ALONE = Ranks(0, 1, torch.device("cpu"))
DENOISE = {"kind": "denoise", "width": 32, "layers": 1, "heads": 4}


@pytest.fixture
def config(tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The tiny run; its second phase is validated on six pictures of their own, and text, every second step."""
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    made = tiny_run.make_config(tmp_path, tiny_model())
    root = tmp_path / "held_out"
    ids = tiny_set.save_pictures(root, 6, seed=9)
    tiny_set.save_manifest(tmp_path / "held_out_tokens", root, ids, code_seed=5)
    tiny_set.save_records(tmp_path / "held_out.json", ids, text_only=2, seed=6)
    values = made.model_dump(mode="json")
    values["phases"][1]["validation"] = {
        "data": [{"path": str(tmp_path / "held_out.json"), "image_root": str(root)}],
        "manifests": [str(tmp_path / "held_out_tokens")],
        "every": 2,
    }
    return TrainConfig.model_validate(values)


def alone(config: TrainConfig) -> TrainConfig:
    return config.model_copy(update={"phases": config.phases[1:]})


def validated(prepared: Prepared, step: int = 1) -> Any:
    assert prepared.held_out is not None
    return validate(prepared.model, prepared.model, prepared.held_out, ALONE, step=step, seed=3, workers=2)


def test_the_losses_are_those_of_every_sample_once(config: TrainConfig) -> None:
    prepared = prepare(alone(config), config.phase("instruct"))
    held_out = prepared.held_out
    assert held_out is not None
    prepared.model.train()
    found = validated(prepared)
    assert prepared.model.training, "the mode is given back"
    assert not set(held_out.samples.names) & set(prepared.samples.names)
    prepared.model.eval()
    sums = []
    for index in range(len(held_out.samples)):  # each by itself: no packing, no batches
        with torch.no_grad():
            sums.append(prepared.model(held_out.collator(np.array([index]))))
    codes = [own.terms["codes"] for own in sums]
    text_tokens, targets = sum(own.text_tokens for own in sums), sum(own.targets for own in codes)
    depth = (torch.stack([own.loss_sum_D for own in codes]).sum(0) / targets).tolist()
    right = (torch.stack([own.correct_D for own in codes]).sum(0) / targets).tolist()
    text = sum(own.text_loss_sum.item() for own in sums) / text_tokens
    term = found.objectives["codes"]
    assert (found.samples, found.text_tokens, term.targets) == (8, text_tokens, targets)
    assert found.text_loss == pytest.approx(text, rel=1e-5)
    assert term.loss_depth == pytest.approx(depth, rel=1e-5)
    assert term.accuracy_depth == pytest.approx(right)
    assert found.loss == pytest.approx(text + sum(depth) / len(depth), rel=1e-5)
    assert not any(parameter.grad is not None for parameter in prepared.model.parameters())


def test_noise_is_the_same_every_time(config: TrainConfig, tmp_path: Path) -> None:
    from manifests.schema import FeaturesSpec

    spec = FeaturesSpec(
        kind="vae", origin="tiny", weights_sha256={}, view_size=28, grid=(4, 4), width=4, dtype="float32",
        settings={"scaling_factor": 0.5},
    )  # fmt: skip
    values = config.model_dump(mode="json")
    for root, name in (("images", "latents"), ("held_out", "held_out_latents")):
        ids = sorted(path.name for path in (tmp_path / root).iterdir())
        rows = np.random.default_rng(len(ids)).normal(size=(len(ids), 16, 4)).astype(np.float32)
        tiny_set.save_features(tmp_path / name, tmp_path / root, ids, spec, rows)
    phase = values["phases"][1]
    phase["objective"] = [phase["objective"], {**DENOISE, "manifests": [str(tmp_path / "latents")]}]
    phase["validation"]["manifests"].append(str(tmp_path / "held_out_latents"))
    both = TrainConfig.model_validate(values)
    prepared = prepare(alone(both), both.phase("instruct"))
    one, other = validated(prepared, 1), validated(prepared, 2)
    assert replace(one, seconds=0, step=0) == replace(other, seconds=0, step=0)
    assert set(one.objectives) == {"codes", "denoise"}, "each group of manifests found its held-out one"
    assert DRAWS == 0
    assert draw_seed(3, DRAWS) not in {draw_seed(3, step) for step in range(1, 100)}


def test_a_validated_run_learns_what_another_learns_on_one_rank_and_on_two(
    config: TrainConfig, ranks: Ranks, tmp_path: Path
) -> None:
    config = alone(config)
    without = config.model_dump(mode="json")
    without["phases"][0]["validation"] = None
    plain = TrainConfig.model_validate({**without, "output": str(tmp_path / "plain")})
    two = config.model_copy(update={"output": str(tmp_path / "two"), "save_every": 6})
    for own in (plain, config):
        run_phase(own, own.phase("instruct"), ranks, None, Stopper())
    said = tiny_run.train(two, tmp_path / "c", ranks=2)

    def records(own: TrainConfig, kind: str | None) -> list[dict[str, Any]]:
        return [line for line in tiny_run.steps(own, "instruct") if line.get("kind") == kind]

    assert records(config, None) == records(plain, None), "bit for bit"
    validations = records(config, "validation")
    assert [line["step"] for line in validations] == [2, 4, 6]
    assert [line["samples"] for line in validations] == [8, 8, 8]
    assert len(validations[0]["objectives.codes.accuracy_depth"]) == 2
    assert len({line["loss"] for line in validations}) == 3
    assert said.count("validation after step") == 3
    for mine, theirs in zip(validations, records(two, "validation"), strict=True):
        assert theirs.keys() == mine.keys()
        for key in ("loss", "text_loss", "objectives.codes.loss_depth", "objectives.codes.accuracy_depth"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-5), key
    order = [
        (line["step"], line.get("kind", "step"))
        for line in map(json.loads, (config.phase_folder("instruct") / "metrics.jsonl").read_text().splitlines())
    ]
    assert order[1:3] == [(2, "step"), (2, "validation")]


@pytest.mark.parametrize("every", [4, None], ids=["in the middle", "at the end"])
def test_held_out_pictures_that_cannot_be_read_cost_no_step(
    config: TrainConfig, ranks: Ranks, tmp_path: Path, every: int | None
) -> None:
    values = alone(config).model_dump(mode="json") | {"save_every": 1000}
    values["phases"][0]["validation"]["every"] = every
    config = TrainConfig.model_validate(values)
    phase, root = config.phase("instruct"), tmp_path / "held_out"
    data = load_data(config, phase)
    root.rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"of sample held_out\.json:"):
        run_phase(config, phase, ranks, data, Stopper())
    saved = newest(config.phase_folder("instruct"))
    assert saved is not None
    assert (saved.step, saved.final) == (every or 6, False)
    (tmp_path / "away").rename(root)
    assert run_phase(config, phase, ranks, None, Stopper()) is None
    done = newest(config.phase_folder("instruct"))
    assert done is not None
    assert (done.step, done.final) == (6, True)
    lines = [json.loads(line) for line in (config.phase_folder("instruct") / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "kind" not in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "kind" in line] == [6], "one in the middle is not made up for"


def test_it_is_due_every_so_often_and_at_the_end(config: TrainConfig) -> None:
    phase = config.phase("instruct")
    assert [step for step in range(1, 8) if is_due(phase, step, 7)] == [2, 4, 6, 7]
    assert phase.validation is not None
    rarely = phase.model_copy(update={"validation": phase.validation.model_copy(update={"every": None})})
    assert [step for step in range(1, 8) if is_due(rarely, step, 7)] == [7]


def test_validation_is_no_setting_of_what_is_learned(config: TrainConfig) -> None:
    without = config.model_dump(mode="json")
    without["phases"][1]["validation"] = None
    plain = TrainConfig.model_validate(without)
    assert settings_of(plain, "instruct") == settings_of(config, "instruct")


def test_a_set_of_another_kind_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    ids = sorted(path.name for path in (tmp_path / "held_out").iterdir())
    squash = tiny_set.GEOMETRY.model_copy(update={"mode": "squash"})
    tiny_set.save_manifest(tmp_path / "squashed", tmp_path / "held_out", ids, geometry=squash)
    values = config.model_dump(mode="json")
    values["phases"][1]["validation"]["manifests"] = [str(tmp_path / "squashed")]
    wrong = TrainConfig.model_validate(values)
    with pytest.raises(
        InputError, match=r"validation of phase instruct names .*squashed.*geometry\.mode: .pad. -> .squash."
    ):
        prepare(alone(wrong), wrong.phase("instruct"))


def test_without_manifests_of_its_own_the_phase_s_are_used(config: TrainConfig) -> None:
    phase = config.phase("instruct")
    assert phase.validation is not None
    tables: dict[str, Any] = {"codes": object()}
    assert validation_tables(phase, phase.validation.model_copy(update={"manifests": ()}), tables) == tables


def test_a_loss_that_is_not_finite_names_its_samples(config: TrainConfig) -> None:
    prepared = prepare(alone(config), config.phase("instruct"))
    with torch.no_grad():
        prepared.model.llava.model.language_model.norm.weight[0] = torch.nan
    with pytest.raises(TrainingStopped, match=r"at step 1 the validation loss is not finite; the samples are held_out"):
        validated(prepared)
