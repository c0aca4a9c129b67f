"""ZeRO 1, 2 and 3 compute what plain torch computes, on one rank and on two, whatever the accumulation and the pictures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_run
import tiny_set
import torch
import zero_cases
from safetensors.torch import load_file
from zero_cases import CASES, ELASTIC, RATE, STAGES, STEPS, VARIANTS, Case

from manifests.schema import Geometry
from pipeline.ranks import run_ranks
from train_stage.batch import count_text_targets
from train_stage.config import LoraConfig, ModelConfig, TrainConfig
from train_stage.deepspeed_settings import DECIDING, DERIVED, FOREIGN, WATCHING
from train_stage.engine import BETAS, EPSILON
from train_stage.parts import NEWLINE_NAME
from train_stage.prepare import prepare
from train_stage.ranks import Ranks

PROJECTOR_RATE = 2 * RATE
DECAY = 10.0
VIEW = tiny_set.VIEW
ANYRES = Geometry(
    mode="anyres",
    size=VIEW,
    background=(0, 0, 0),
    grid_pinpoints=((VIEW, 2 * VIEW), (2 * VIEW, VIEW), (2 * VIEW, 2 * VIEW)),
)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, TrainConfig]]:
    """The configuration of the cases, called `whole`, and those of the variants. Many steps, so the smallest models."""
    folder = tmp_path_factory.mktemp("zero")
    tiny_models.save_tower("siglip", folder / "tower", blocks=2)
    tiny_models.save_language_model(folder / "llama", tied=False, layers=1)
    model = ModelConfig(language_model=str(folder / "llama"), vision_tower=str(folder / "tower"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASVR_CACHE", str(folder / "cache"))
        made = tiny_run.make_config(folder, model, pictures=zero_cases.PICTURES)
        ids = sorted(path.name for path in (folder / "images").iterdir())
        tiny_set.save_records(folder / "talks.json", ids, text_only=zero_cases.TEXTS)
        tiny_set.save_manifest(folder / "tiles", folder / "images", ids, geometry=ANYRES, encode=codes_of_views)
        phase = made.phases[1].model_copy(
            update={"part_lr": {"projector": PROJECTOR_RATE}, "clip": 0.5, "weight_decay": DECAY}
        )
        changes: dict[str, dict[str, Any]] = {
            "whole": {},
            "lora": {"lora": LoraConfig(rank=4, alpha=8)},
            "anyres": {"manifests": (str(folder / "tiles"),)},
        }
        yield {
            name: made.model_copy(update={"phases": (phase.model_copy(update=own),)}) for name, own in changes.items()
        }


def codes_of_views(views_VSSC: np.ndarray) -> np.ndarray:
    """Codes that every view has for itself, and every cell."""
    views, positions, depth = len(views_VSSC), tiny_set.GRID[0] * tiny_set.GRID[1], len(tiny_set.SIZES)
    return np.arange(views * positions * depth).reshape(views, positions, depth) % min(tiny_set.SIZES)


@pytest.fixture(scope="module")
def config(configs: dict[str, TrainConfig]) -> TrainConfig:
    return configs["whole"]


@pytest.fixture(scope="module")
def plain(config: TrainConfig) -> list[dict[str, float]]:
    return plain_steps(config)


def plain_steps(config: TrainConfig) -> list[dict[str, float]]:
    """The losses and gradient norms of the steps in plain torch, each step one batch."""
    prepared = prepare(config, config.phase("instruct"))
    model = prepared.model
    assert [model_has_picture(prepared, index) for index in (13, 14)] == [True, False]
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {
            "params": [parameter],
            "lr": PROJECTOR_RATE if is_of_projector(name) else RATE,
            "weight_decay": DECAY if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in named.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON)
    found = []
    for chosen in STEPS:
        (batch,) = zero_cases.collate(prepared, [chosen])
        sums = model(batch)
        text = sums.text_loss_sum / count_text_targets(batch)
        visual = sums.terms["codes"].loss_sum_D.mean() / max(sums.terms["codes"].targets, 1)
        optimizer.zero_grad(set_to_none=False)
        (text + visual).backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
        optimizer.step()
        found.append({"text": text.item(), "visual": visual.item(), "norm": norm.item()})
    return found


def is_of_projector(name: str) -> bool:
    return "multi_modal_projector" in name or name == NEWLINE_NAME


def model_has_picture(prepared: Any, index: int) -> bool:
    return bool(len(prepared.samples.images_of(index)))


@pytest.fixture(scope="module")
def one(
    configs: dict[str, TrainConfig], ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """Every case and variant on one rank, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = zero_cases.run_cases(configs["whole"], ranks, folder)
    found |= zero_cases.run_variants(configs, ranks, folder)
    return found | zero_cases.run_in_bfloat16(configs["whole"], ranks), folder


@pytest.fixture(scope="module")
def two(configs: dict[str, TrainConfig], one: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    """Every case and variant on two ranks, which are started once."""
    folder = one[1]
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(config.model_dump_json())
    command = [sys.executable, zero_cases.__file__, str(folder)]
    places = os.pathsep.join([str(Path(__file__).parent), str(tiny_run.REPOSITORY), os.environ.get("PYTHONPATH", "")])
    run_ranks(command, 2, os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"})
    found: dict[str, Any] = json.loads((folder / "two.json").read_text())
    return found


def check(found: list[dict[str, float]], wanted: list[dict[str, float]], what: str) -> None:
    assert len(found) == len(wanted)
    for step, (own, plain) in enumerate(zip(found, wanted, strict=True)):
        for name in ("text", "visual"):
            assert own[name] == pytest.approx(plain[name], abs=1e-6), (what, name, step)
        assert own["norm"] == pytest.approx(plain["norm"], rel=1e-5), (what, step)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("world", [1, 2])
def test_losses_equal_those_of_plain_torch(
    world: int, case: Case, one: tuple[dict[str, Any], Path], two: dict[str, Any], plain: list[dict[str, float]]
) -> None:
    """Also where one of the ranks, or all of them, have a step without pictures."""
    check((one[0] if world == 1 else two)[case.name]["losses"], plain, case.name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_ends_with_the_same_bits(
    stage: int, one: tuple[dict[str, Any], Path], two: dict[str, Any]
) -> None:
    name = Case(stage, 1).name
    for found in (one[0], two):
        assert found[f"zero{stage} resumed"]["weights"] == found[name]["weights"]
        assert found[f"zero{stage} resumed"]["losses"] == found[name]["losses"][zero_cases.SAVED_AFTER :]


@pytest.mark.parametrize("stage", ELASTIC)
def test_another_number_of_ranks_goes_on_with_the_same_losses(
    stage: int,
    config: TrainConfig,
    ranks: Ranks,
    one: tuple[dict[str, Any], Path],
    two: dict[str, Any],
    plain: list[dict[str, float]],
) -> None:
    rest = plain[zero_cases.SAVED_AFTER :]
    check(two[f"zero{stage} elastic"]["losses"], rest, "two ranks after one")
    alone = zero_cases.go_on(config, stage, ranks, one[1] / f"world2 zero{stage}", written_by=2)
    check(alone["losses"], rest, "one rank after two")


@pytest.mark.parametrize(("name", "stage"), VARIANTS)
def test_adapters_and_tiles_are_the_same_on_two_ranks(
    name: str,
    stage: int,
    configs: dict[str, TrainConfig],
    one: tuple[dict[str, Any], Path],
    two: dict[str, Any],
) -> None:
    """Losses, and the weights that are handed on: with LoRA those of whole layers, with LLaVA-NeXT its newline too."""
    case, plain = f"{name} zero{stage}", plain_steps(configs[name])
    check(one[0][case]["losses"], plain, "one rank")
    check(two[case]["losses"], plain, "two ranks")
    alone, together = (load_file(one[1] / f"world{world} {case}.safetensors") for world in (1, 2))
    assert alone.keys() == together.keys()
    assert any("layers.0.self_attn.q_proj" in key for key in alone)
    assert not any("lora" in key for key in alone)
    assert (NEWLINE_NAME in alone) is (name == "anyres")
    for key, value in alone.items():
        if not key.endswith("in_proj.bias"):  # attention does not feel its keys' bias; Adam blows up what is rounding
            torch.testing.assert_close(together[key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_gradients_are_summed_over_ranks_in_float32(
    stage: int, one: tuple[dict[str, Any], Path], two: dict[str, Any]
) -> None:
    """As over the micro-batches of one rank; sums in bfloat16 would be off by up to 1/256."""
    name = f"bfloat16 zero{stage}"
    norms, wanted = ([step["norm"] for step in found[name]] for found in (two, one[0]))
    assert norms == pytest.approx(wanted, rel=1e-6)


class Recorder(dict[str, Any]):
    """A dictionary that knows which keys were asked for."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def test_every_setting_that_deepspeed_reads_is_in_one_table(ranks: Ranks) -> None:
    """DeepSpeed has no list of its keys, so it is watched while it reads."""
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = Recorder(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    DeepSpeedConfig(settings)
    tables = (DERIVED, FOREIGN, WATCHING, DECIDING)
    assert settings.asked <= set().union(*tables)
    assert sum(map(len, tables)) == len(set().union(*tables))
