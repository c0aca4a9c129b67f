"""What `asvr train --check` finds in a whole run before anything of it is started; `tests/pipeline` has it as a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import tiny_set

from train_stage.check import Fleet, Report, check
from train_stage.config import ModelConfig, TrainConfig
from train_stage.phase_data import load_ahead


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[], ModelConfig], monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    return tiny_run.make_config(tmp_path, tiny_model(), pictures=6)


def changed(config: TrainConfig, phase: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """The run with another second phase."""
    values = config.model_dump(mode="json") | changes
    values["phases"][1] |= phase or {}
    return TrainConfig.model_validate(values)


def checked(config: TrainConfig, phase: dict[str, Any] | None = None, **changes: Any) -> Report:
    return check(changed(config, phase, **changes), Fleet(gpus=1, peak=1e15, mfu=0.4))


def other_set(config: TrainConfig, name: str, **settings: Any) -> str:
    """A set of the run's pictures that is made with other settings."""
    root = Path(config.phases[0].data[0].image_root)
    ids = sorted(path.name for path in root.iterdir())
    tiny_set.save_manifest(root.parent / name, root, ids, **settings)
    return str(root.parent / name)


def test_held_out_records_and_sets_are_looked_at(config: TrainConfig, tmp_path: Path) -> None:
    assert not checked(config).problems
    (data,) = (own.model_dump(mode="json") for own in config.phases[1].data)
    assert not checked(config, {"validation": {"data": [data]}}).problems
    gone = {"path": str(tmp_path / "gone.json"), "image_root": str(tmp_path / "nowhere")}
    assert checked(config, {"validation": {"data": [gone]}}).problems == [
        f"phase instruct/validation: there is no data file {tmp_path / 'gone.json'}",
        f"phase instruct/validation: there is no image root {tmp_path / 'nowhere'}",
    ]
    squash = other_set(config, "squash", geometry=tiny_set.GEOMETRY.model_copy(update={"mode": "squash"}))
    validation = {"data": [data], "manifests": [squash]}
    (problem,) = checked(config, {"validation": validation}).problems
    assert str(load_ahead(changed(config, {"validation": validation})).error) == problem, (
        "so it keeps the run from starting"
    )
    assert "made with other settings than the manifests of the phase (geometry." in problem


def test_what_is_evaluated_later_is_a_note(config: TrainConfig, tmp_path: Path) -> None:
    gone = {"path": str(tmp_path / "gone.json"), "image_root": str(tmp_path)}
    report = checked(config, eval={"data": [gone], "manifests": [str(tmp_path / "none")]})
    assert not report.problems
    data, manifest = report.notes
    assert data == f"eval: there is no data file {tmp_path / 'gone.json'}"
    assert manifest.startswith("eval: ")
    assert str(tmp_path / "none") in manifest


def test_codes_that_are_shown_have_the_tower_s_grid_and_spare_its_work(config: TrainConfig, tmp_path: Path) -> None:
    shown = checked(config, {"input_codes": [str(tmp_path / "tokens")]})
    assert not shown.problems
    computed = checked(config)
    assert shown.phases[1].flops < computed.phases[1].flops
    coarse = other_set(config, "coarse", grid=(2, 2))
    (problem,) = checked(config, {"input_codes": [coarse]}).problems
    assert "has 2x2 positions a view and the vision tower makes 4x4" in problem


def test_features_that_the_tower_does_not_make_are_a_problem(config: TrainConfig, tmp_path: Path) -> None:
    (problem,) = checked(config, {"vision_features": [str(tmp_path / "tokens")]}).problems
    assert "is no set of an encoder's features" in problem


@pytest.mark.parametrize("spoilt", ["template", "length"])
def test_records_that_a_run_can_leave_out_are_a_note(config: TrainConfig, tmp_path: Path, spoilt: str) -> None:
    records = json.loads((tmp_path / "talks.json").read_text())
    bad = records[0]
    if spoilt == "template":
        bad["conversations"][0]["value"] = "no image token"
    else:
        bad["image"] = [bad["image"]] * 40
        bad["conversations"][0]["value"] = "<image>" * 40
    (tmp_path / "talks.json").write_text(json.dumps(records))
    few, many = {"max_bad_rate": 0.5}, {"max_bad_rate": 0.01}
    assert load_ahead(changed(config, few)).error is None
    report = checked(config, few)
    assert not report.problems
    (note,) = report.notes
    assert note.startswith(f"phase instruct: 1 of the first {len(records)} records, max_bad_rate is 0.5; a record of ")
    assert ("does not fit template" if spoilt == "template" else "cuts an image off") in note
    assert load_ahead(changed(config, many)).error is not None
    (problem,) = checked(config, many).problems
    assert problem == note.replace("0.5", "0.01")
