"""What DeepSpeed leaves wrong is put right: shared steps of Adam, models that outlive their run, another linear layer."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import tiny_run
import torch
from torch import nn

from train_stage.deepspeed_repairs import give_own_steps
from train_stage.engine import Engine
from train_stage.loader import collect_steps
from train_stage.loop import train_step
from train_stage.prepare import prepare
from train_stage.ranks import Ranks

LINEAR = nn.functional.linear
"""Before any engine has taken another in its place."""


def test_steps_are_apart_and_where_their_parameters_are() -> None:
    """A device that holds no numbers stands for the GPU."""
    here, there = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    optimizer = torch.optim.AdamW([here, there])
    shared = torch.tensor(7.0)
    for parameter in (here, there):
        optimizer.state[parameter]["step"] = shared
    give_own_steps(optimizer)
    here_step, there_step = optimizer.state[here]["step"], optimizer.state[there]["step"]
    assert (here_step.item(), here_step.device.type, there_step.device.type) == (7.0, "cpu", "meta")
    shared += 1
    assert here_step.item() == 7.0


@pytest.mark.parametrize("stage", [1, 3])
def test_a_finished_engine_leaves_nothing_behind(
    tmp_path: Path, tiny_model, monkeypatch: pytest.MonkeyPatch, ranks: Ranks, stage: int
) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    config = tiny_run.make_config(tmp_path, tiny_model())
    deepspeed = {"zero_optimization": {"stage": stage}}
    config = config.model_copy(update={"phases": config.phases[1:], "deepspeed": deepspeed})
    phase = config.phase("instruct")
    prepared = prepare(config, phase)
    engine = Engine(prepared.model, config, phase, ranks)
    steps = collect_steps(prepared.plan, prepared.packing, prepared.collator, first_step=1, rank=0, world=1, workers=1)
    for collected, _ in zip(steps, range(2), strict=False):  # from the second pass on ZeRO-3 remembers modules
        train_step(engine, collected, prepared.model.terms, 1e-3, seed=0, epoch=0)
    steps.close()
    engine.close()
    model = weakref.ref(prepared.model)
    del prepared, engine, steps, collected
    gc.collect()
    assert model() is None
    assert nn.functional.linear is LINEAR
