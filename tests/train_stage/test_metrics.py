"""What a run says of itself: on the console, in metrics.jsonl, and through DeepSpeed's monitors."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manifests.errors import EnvironmentProblem, RecipeError
from train_stage.config import ModelConfig
from train_stage.flops import FlopModel, Work
from train_stage.metrics import Meter, MetricsLog, StepMetrics, TermMetrics, charted, last_records
from train_stage.monitors import Monitors
from train_stage.ranks import Ranks
from train_stage.run import run_phase
from train_stage.stopping import Stopper

PHASE = "pretrain"


def metrics(**changes: object) -> StepMetrics:
    values = {
        "step": 3, "epoch": 0, "loss": 3.0, "text_loss": 1.0, "visual_loss": 2.0,
        "objectives": {"codes": TermMetrics(2.0, [1.5, 2.5], [0.5, 0.25], 40)},
        "grad_norm": 0.5, "lr": 1e-3, "samples": 4, "tokens": 100, "text_tokens": 20, "pairs": 3000, "views": 4,
        "padding": 0.1, "memory": 2**30, "seconds": 2.0, "data_wait": 0.05,
    }  # fmt: skip
    return StepMetrics(**{**values, **changes})


def test_speed_is_counts_by_seconds_and_mfu_is_its_formula() -> None:
    flops = FlopModel(token=10, pair=1, text_token=5, view=100, target={"codes": 2})
    meter = Meter(flops, devices=2, peak=1000.0)
    total = 10 * 100 + 1 * 3000 + 5 * 20 + 100 * 4 + 2 * 40
    assert flops(Work(100, 3000, 20, 4, {"codes": 40})) == total
    assert meter(metrics()) == {
        "flops": total,
        "tokens_per_second": 50.0,
        "views_per_second": 2.0,
        "mfu": total / (2.0 * 2 * 1000.0),
    }


def test_mfu_is_absent_on_a_device_without_a_known_peak() -> None:
    flops = FlopModel(1, 1, 1, 1, {"codes": 1})
    meter = Meter.of(flops, 1, torch.device("cpu"), "bfloat16")
    assert meter(metrics())["mfu"] is None
    assert "speed/mfu" not in charted(metrics(), meter(metrics()))


def test_every_depth_and_no_absent_number_is_charted() -> None:
    found = charted(metrics(), {"flops": 1.0, "tokens_per_second": 50.0, "views_per_second": 2.0, "mfu": 0.4})
    assert found["loss/codes/depth_1"] == 2.5
    assert found["accuracy/codes/depth_0"] == 0.5
    assert found["speed/mfu"] == 0.4
    text = charted(metrics(visual_loss=None, objectives={}), {"flops": 1.0, "mfu": None})
    assert not [name for name in text if "visual" in name or "accuracy" in name or "mfu" in name]


def test_a_run_is_watched_everywhere_at_once(
    tmp_path: Path,
    tiny_model: Callable[..., ModelConfig],
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    monitors = {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True}}
    config = tiny_run.make_config(tmp_path, tiny_model(), deepspeed=monitors)
    first = config.phases[0].model_copy(update={"part_lr": {"projector": 2e-4}})
    config = config.model_copy(update={"phases": (first, *config.phases[1:])})
    with caplog.at_level(logging.INFO):
        run_phase(config, config.phase(PHASE), ranks, None, Stopper())
    folder = config.phase_folder(PHASE)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=1e-6)
        assert row["views"] == row["samples"], "every caption has a picture"
        assert row["flops"] > 0
        assert row["mfu"] is None
        assert row["part_lr"] == {"projector": pytest.approx(row["lr"] * 0.2)}, "the phase's peak is 1e-3"
        assert 0 <= row["padding"] < 0.2
        assert row["memory"] > 100 * 2**20
        assert row["tokens"] <= row["pairs"] <= row["tokens"] ** 2
    said = [record.getMessage() for record in caplog.records if "tokens/s" in record.getMessage()]
    assert len(said) == 3
    assert all("MFU" not in line and "GiB" in line for line in said)

    files = {path.stem: path for path in (folder / "csv_monitor").glob("*.csv")}
    with files["loss_codes_depth_1"].open() as file:
        written = list(csv.reader(file))[1:]
    assert [(int(step), float(value)) for step, value in written] == [
        (row["step"], pytest.approx(row["objectives"]["codes"]["loss_depth"][1], rel=1e-6)) for row in rows
    ]
    assert not [name for name in files if name.startswith("Train")], "DeepSpeed's own count samples wrongly"
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {
        "loss/text",
        "loss/visual",
        "optimizer/lr",
        "optimizer/lr/projector",
        "speed/data_wait",
        "memory/peak_gib",
    } <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/text")] == [1, 2, 3]


def test_monitors_that_cannot_write_are_one_sentence(tmp_path: Path, ranks: Ranks) -> None:
    with pytest.raises(RecipeError, match=r"DeepSpeed refuses tensorboard.enabled of its settings"):
        Monitors({"tensorboard": {"enabled": "perhaps"}}, tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"^deepspeed.wandb needs a package that is missing"):
        Monitors({"wandb": {"enabled": True}}, tmp_path)
    Monitors({}, tmp_path).write({"loss": 1.0}, 1)
    assert not list(tmp_path.iterdir())


def test_a_damaged_log_keeps_its_other_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step"\xff\x00\n[3]\n{"kind": "validation", "step": 2}\n{"step": 3}\n{"step": 4')
    assert last_records(tmp_path) == {
        "training": {"step": 3},
        "validation": {"kind": "validation", "step": 2},
    }
    meter = Meter(FlopModel(1, 1, 1, 1, {}), devices=1, peak=None)
    MetricsLog(tmp_path, 2, 5, 1, meter, lambda *_: None, writes=True).close()
    assert path.read_text() == '{"step": 1}\n{"kind": "validation", "step": 2}\n'
    assert [
        f"line {number} of {path}" in entry.message for entry, number in zip(caplog.records, (2, 3, 2, 3), strict=True)
    ]
