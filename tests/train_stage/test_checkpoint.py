"""Which checkpoints count, what they are compared with, and which of them stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from manifests.errors import InputError, TrainingStopped
from train_stage import checkpoint as checkpoints
from train_stage.config import TrainConfig


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path: Path, tiny_model) -> TrainConfig:
    return tiny_run.make_config(tmp_path, tiny_model(), pictures=4)


def write(config: TrainConfig, phase: str, step: int, *, final: bool = False, keep_last: int = 2) -> Path:
    folder = config.phase_folder(phase)
    unfinished = folder / checkpoints.unfinished_name(step)
    (unfinished / "deepspeed").mkdir(parents=True)
    (unfinished / "deepspeed" / "state.pt").write_bytes(b"state")
    settings = checkpoints.settings_of(config, phase)
    return checkpoints.commit(folder, step, final=final, world=1, settings=settings, config=config, keep_last=keep_last)


def changed(config: TrainConfig, phase: int = 0, **changes) -> TrainConfig:
    values = config.model_dump(mode="json")
    values["phases"][phase] |= changes
    return TrainConfig.model_validate(values)


def test_the_newest_complete_one_counts(config: TrainConfig) -> None:
    folder = config.phase_folder("pretrain")
    assert checkpoints.newest(folder) is None
    for step in (8, 9, 10):
        write(config, "pretrain", step)
    (folder / "step_11.tmp").mkdir()  # killed while writing
    (folder / "step_12").mkdir()  # no marker
    newest = checkpoints.newest(folder)
    assert newest is not None
    assert (newest.step, newest.path) == (10, folder / "step_10")
    assert [found.step for found in checkpoints.complete(folder)] == [9, 10]
    checkpoints.remove_unfinished(folder)
    assert not (folder / "step_11.tmp").exists()


@pytest.mark.parametrize("change", [None, [], {"samples": 3}, {"samples": {"count": 3}}])
def test_a_damaged_marker_is_named(config: TrainConfig, change: Any) -> None:
    path = write(config, "pretrain", 1)
    marker = path / checkpoints.MARKER
    value = json.loads(marker.read_bytes()) | change if isinstance(change, dict) else change
    marker.write_text("{" if value is None else json.dumps(value))
    with pytest.raises(TrainingStopped, match=r"COMPLETE\.json is damaged: remove .*step_1"):
        checkpoints.newest(config.phase_folder("pretrain"))


def test_a_run_is_finished_when_every_phase_is(config: TrainConfig) -> None:
    write(config, "pretrain", 3, final=True)
    write(config, "instruct", 4)
    assert not checkpoints.is_finished(config)
    write(config, "instruct", 6, final=True)
    assert checkpoints.is_finished(config)
    assert not checkpoints.is_finished(changed(config, lr=0.5))


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"lr": 0.5}, r"phase\.lr: 0\.001 -> 0\.5"),
        ({"max_steps": 2}, r"phase\.max_steps: null -> 2"),
        ({"trainable": ["projector"]}, r"phase\.trainable: "),
        ({"objective": {"kind": "codes", "shift": "next", "head": tiny_run.HEAD}}, r"phase\.objective\.shift: "),
    ],
)
def test_other_settings_are_refused_by_name(config: TrainConfig, changes: dict, differing: str) -> None:
    write(config, "pretrain", 2)
    newest = checkpoints.newest(config.phase_folder("pretrain"))
    assert newest is not None
    with pytest.raises(TrainingStopped, match=differing):
        checkpoints.check_fits(newest, checkpoints.settings_of(changed(config, **changes), "pretrain"))


def test_inputs_are_compared_by_content(config: TrainConfig, tmp_path: Path) -> None:
    write(config, "pretrain", 2)
    newest = checkpoints.newest(config.phase_folder("pretrain"))
    assert newest is not None
    moved = tmp_path / "elsewhere.json"
    moved.write_bytes((tmp_path / "captions.json").read_bytes())
    data = [{"path": str(moved), "image_root": str(tmp_path / "images")}]
    same = changed(config, data=data, micro_batch_tokens=4096, max_bad_rate=0.5)
    checkpoints.check_fits(newest, checkpoints.settings_of(same, "pretrain"))
    records = json.loads(moved.read_text())
    moved.write_text(json.dumps(records[1:]))
    with pytest.raises(TrainingStopped, match=r"other settings \(data: other records\).* asvr run RECIPE --replace"):
        checkpoints.check_fits(newest, checkpoints.settings_of(same, "pretrain"))


def test_the_ratio_of_a_file_is_a_setting(config: TrainConfig) -> None:
    """Another one is another order of other samples, from the records of the very same file."""
    write(config, "pretrain", 2)
    newest = checkpoints.newest(config.phase_folder("pretrain"))
    assert newest is not None
    (data,) = config.phases[0].data
    once = changed(config, data=[{**data.model_dump(mode="json"), "ratio": 1}])
    checkpoints.check_fits(newest, checkpoints.settings_of(once, "pretrain"))
    half = changed(config, data=[{**data.model_dump(mode="json"), "ratio": 0.5}])
    with pytest.raises(TrainingStopped, match=r"other settings \(ratios: \(absent\) -> \[0\.5\]\)"):
        checkpoints.check_fits(newest, checkpoints.settings_of(half, "pretrain"))


def test_other_versions_are_named(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    path = write(config, "pretrain", 1)
    marker = json.loads((path / checkpoints.MARKER).read_text())
    newest = checkpoints.newest(config.phase_folder("pretrain"))
    assert newest is not None
    checkpoints.name_other_versions(newest)
    assert not caplog.messages
    marker["versions"]["torch"] = "1.0"
    (path / checkpoints.MARKER).write_text(json.dumps(marker))
    newest = checkpoints.newest(config.phase_folder("pretrain"))
    assert newest is not None
    checkpoints.name_other_versions(newest)
    assert 'with other packages (torch: "1.0" -> ' in caplog.messages[0]


def test_what_only_watches_may_change(config: TrainConfig) -> None:
    write(config, "pretrain", 1)
    newest = checkpoints.newest(config.phase_folder("pretrain"))
    assert newest is not None
    watching = {"csv_monitor": {"enabled": True}, "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}
    same = TrainConfig.model_validate(config.model_dump(mode="json") | {"deepspeed": watching})
    checkpoints.check_fits(newest, checkpoints.settings_of(same, "pretrain"))
    other = TrainConfig.model_validate(
        config.model_dump(mode="json") | {"deepspeed": {"zero_optimization": {"stage": 3}}}
    )
    with pytest.raises(TrainingStopped, match=r"deepspeed\.zero_optimization\.stage: 1 -> 3"):
        checkpoints.check_fits(newest, checkpoints.settings_of(other, "pretrain"))


def test_a_phase_knows_the_phase_it_came_after(config: TrainConfig) -> None:
    write(config, "instruct", 2)
    newest = checkpoints.newest(config.phase_folder("instruct"))
    assert newest is not None
    with pytest.raises(TrainingStopped, match="after: the phase before it"):
        checkpoints.check_fits(newest, checkpoints.settings_of(changed(config, phase=0, lr=0.5), "instruct"))


def test_a_missing_data_file_is_one_sentence(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "captions.json").unlink()
    with pytest.raises(InputError, match=r"captions\.json does not exist"):
        checkpoints.settings_of(config, "pretrain")
