"""Every kind of term trains in both phases through the real engine, alone and together, from manifests on disk."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import tiny_set
import torch

from manifests.errors import InputError
from manifests.schema import FeaturesSpec
from train_stage.config import TrainConfig
from train_stage.engine import Engine
from train_stage.loader import collect_steps
from train_stage.loop import train_step
from train_stage.parts import load_trainable
from train_stage.prepare import open_inputs, prepare
from train_stage.ranks import Ranks
from train_stage.tensor_files import load_weights, save_tensors

DENOISE = {"kind": "denoise", "width": 32, "layers": 1, "heads": 4}
ALIGN = {"kind": "align", "width": 24}


def features(kind: str, grid: tuple[int, int], width: int, dtype: str) -> FeaturesSpec:
    settings = {"scaling_factor": 0.5, "shift_factor": 0.1} if kind == "vae" else {}
    return FeaturesSpec(
        kind=kind,
        origin="tiny",
        weights_sha256={},
        view_size=56,
        grid=grid,
        width=width,
        dtype=dtype,
        settings=settings,
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> tuple[Path, TrainConfig]:
    """A tiny run with codes, other codes, VAE latents of larger views on a grid twice as fine, and bfloat16 features."""
    folder = tmp_path_factory.mktemp("terms")
    config = tiny_run.make_config(folder, tiny_model())
    root, rng = folder / "images", np.random.default_rng(0)
    ids = sorted(path.name for path in root.iterdir())
    tiny_set.save_manifest(folder / "appearance", root, ids, seed=7)
    finer = tiny_set.GEOMETRY.model_copy(update={"size": 56})
    latents = rng.normal(size=(len(ids), 64, 4)).astype(np.float32)
    tiny_set.save_features(folder / "vae", root, ids, features("vae", (8, 8), 4, "float32"), latents, geometry=finer)
    bits = (rng.normal(size=(len(ids), 16, 6)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    tiny_set.save_features(folder / "encoder", root, ids, features("features", (4, 4), 6, "bfloat16"), bits)
    return folder, config


def with_objective(shared: tuple[Path, TrainConfig], objective: Any) -> TrainConfig:
    folder, config = shared
    objective = copy.deepcopy(objective)
    values = config.model_dump(mode="json")
    for phase in values["phases"]:
        phase["objective"] = objective
    for term in objective if isinstance(objective, list) else [objective]:
        if "manifests" in term:
            term["manifests"] = [str(folder / name) for name in term["manifests"]]
    return TrainConfig.model_validate(values)


OBJECTIVES: dict[str, Any] = {
    "none": {"kind": "none"},
    "parallel": {"kind": "codes", "head": {"kind": "parallel"}},
    "semantic and appearance": [
        {"kind": "codes", "name": "semantic", "head": tiny_run.HEAD},
        {
            "kind": "codes",
            "name": "appearance",
            "manifests": ["appearance"],
            "weight": 0.5,
            "shift": "next",
            "head": {**tiny_run.HEAD, "shared_feed_forward": True},
        },
    ],
    "denoise latents": {**DENOISE, "manifests": ["vae"]},
    "denoise features": {**DENOISE, "manifests": ["encoder"], "latents": "mean"},
    "align features": {**ALIGN, "manifests": ["encoder"], "language_layer": 1},
    "align tower": {**ALIGN, "tower_layer": -1},
    "all": [
        {"kind": "codes", "head": tiny_run.HEAD},
        {**DENOISE, "manifests": ["vae"], "weight": 0.1},
        {**ALIGN, "tower_layer": 2, "weight": 0.5},
    ],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_trains_in_both_phases(
    shared: tuple[Path, TrainConfig], ranks: Ranks, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    config = with_objective(shared, OBJECTIVES[name])
    stage = 2 if name == "all" else 1
    config = config.model_copy(
        update={"output": str(tmp_path / "run"), "deepspeed": {"zero_optimization": {"stage": stage}}}
    )
    for phase_name in ("pretrain", "instruct"):
        phase = config.phase(phase_name)
        # Alone, so that it starts from fresh weights: what a phase takes over has tests of its own.
        alone = config.model_copy(update={"phases": tuple(own for own in config.phases if own.name == phase_name)})
        prepared = prepare(alone, phase)
        before = {key: p.detach().clone() for key, p in prepared.model.objectives.named_parameters()}
        engine = Engine(prepared.model, config, phase, ranks)
        plan, packing = prepared.plan, prepared.packing
        steps = collect_steps(plan, packing, prepared.collator, first_step=1, rank=0, world=1, workers=1)
        metrics = [train_step(engine, own, prepared.model.terms, 1e-2, seed=0, epoch=0) for own in steps]
        first = metrics[0]
        assert list(first.objectives) == [term.name for term in phase.terms]
        for term in phase.terms:
            own = first.objectives[term.name]
            expected = {"codes": math.log(12), "denoise": 1.0, "align": 1.0}[term.kind]
            assert own.loss == pytest.approx(expected, rel=0.35 if term.kind == "align" else 0.1)
            assert own.targets > 0
            assert len(own.accuracy_depth) == (2 if term.kind == "codes" else 0)
        total = first.text_loss + sum(t.weight * first.objectives[t.name].loss for t in phase.terms)
        assert first.loss == pytest.approx(total, rel=1e-9)
        still = [key for key, p in prepared.model.objectives.named_parameters() if torch.equal(p, before[key])]
        assert not still, "every parameter of every term learns"
        engine.close()


def test_draws_do_not_depend_on_the_micro_batch(
    shared: tuple[Path, TrainConfig], ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    config = with_objective(shared, {**DENOISE, "manifests": ["vae"]})
    found = []
    for most_tokens in (90, 1000):
        phase = config.phase("pretrain").model_copy(update={"micro_batch_tokens": most_tokens})
        prepared = prepare(config, phase)
        engine = Engine(prepared.model, config, phase, ranks)
        plan, packing = prepared.plan, prepared.packing
        steps = collect_steps(plan, packing, prepared.collator, first_step=1, rank=0, world=1, workers=1)
        found.append([train_step(engine, own, prepared.model.terms, 1e-3, seed=0, epoch=0).loss for own in steps])
        engine.close()
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        ({"kind": "codes", "manifests": ["encoder"]}, "holds features, not codes: give objective codes a set of codes"),
        ({**DENOISE, "manifests": ["tokens"]}, "holds codes, not features: give objective denoise a set of features"),
        ({**ALIGN, "manifests": ["vae"]}, "align needs features on the tower's grid"),
        ({**ALIGN, "tower_layer": 9}, "objective align asks for tower_layer 9, but there are hidden states 0 to 4"),
        ({**ALIGN, "tower_layer": 0, "language_layer": 5}, "asks for language_layer 5, but there are hidden states 0"),
    ],
)
def test_manifests_that_do_not_fit_are_one_sentence(
    shared: tuple[Path, TrainConfig], objective: dict[str, Any], sentence: str
) -> None:
    config = with_objective(shared, dict(objective))
    with pytest.raises(InputError, match=sentence):
        open_inputs(config, config.phase("pretrain"))


def test_weights_of_a_term_reach_the_term_of_that_name(shared: tuple[Path, TrainConfig], tmp_path: Path) -> None:
    config = with_objective(shared, OBJECTIVES["semantic and appearance"])
    trained = open_inputs(config, config.phase("pretrain")).model
    names = [name for name, _ in trained.named_parameters() if name.startswith("objectives.")]
    with torch.no_grad():
        for term in trained.objectives.values():
            for parameter in term.parameters():
                parameter.add_(1)
    own = dict(trained.named_parameters())
    save_tensors({name: own[name].detach() for name in names}, tmp_path / "weights.safetensors")
    alone = with_objective(shared, [{"kind": "codes", "name": "semantic", "head": tiny_run.HEAD}])
    model = open_inputs(alone, alone.phase("instruct")).model
    load_trainable(model, load_weights(tmp_path / "weights.safetensors"))
    own, theirs = model.objectives["semantic"].state_dict(), trained.objectives["semantic"].state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_a_run_takes_terms_from_phase_to_phase_and_resumes(
    shared: tuple[Path, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user runs it: two phases with three terms, checkpoints and all; then nothing is left to do."""
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    config = with_objective(shared, OBJECTIVES["all"]).model_copy(update={"output": str(tmp_path / "run")})
    tiny_run.train(config, tmp_path)
    lines = {phase: tiny_run.steps(config, phase) for phase in ("pretrain", "instruct")}
    assert [len(own) for own in lines.values()] == [3, 6]
    losses = {f"objectives.{name}.loss_depth": depth for name, depth in (("codes", 2), ("denoise", 1), ("align", 1))}
    assert all(len(line[name]) == depth for own in lines.values() for line in own for name, depth in losses.items())
    assert "every phase in" in tiny_run.train(config, tmp_path)
