"""Ranks start with torchrun's environment, end together, say how they ended, and never outlive their launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manifests.errors import EnvironmentProblem, LeaseHeld, RankLost, RecipeError, StorageError, TrainingStopped
from manifests.storage import Store
from pipeline import extras, launch
from pipeline.ranks import RankError, run_ranks
from train_stage.__main__ import read_config
from train_stage.checkpoint import MARKER, settings_of
from train_stage.config import TrainConfig


def config(folder: Path) -> TrainConfig:
    data = [{"path": str(folder / "d.json"), "image_root": str(folder)}]
    phase = {"data": data, "objective": {"kind": "none"}, "geometry": {"mode": "pad", "size": 28}}
    return TrainConfig.model_validate(
        {
            "output": str(folder / "run"),
            "model": {"language_model": str(folder / "lm"), "vision_tower": str(folder / "tower")},
            "phases": [{"name": "pretrain", **phase}, {"name": "instruct", **phase}],
        }
    )


def script(folder: Path, body: str) -> list[str]:
    path = folder / "rank.py"
    path.write_text("import os, pathlib, signal, sys, time\nrank = int(os.environ['RANK'])\n" + body)
    return [sys.executable, str(path)]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ranks_get_the_environment_of_torchrun(tmp_path: Path) -> None:
    body = f"pathlib.Path({str(tmp_path)!r}, str(rank)).write_text(repr(dict(os.environ)))"
    run_ranks(script(tmp_path, body), 3, dict(os.environ))
    seen = [eval((tmp_path / str(rank)).read_text()) for rank in range(3)]  # noqa: S307 - written a line above
    for rank, environment in enumerate(seen):
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert len({environment["MASTER_PORT"] for environment in seen}) == 1


def test_a_failed_rank_ends_the_others_and_keeps_its_code(tmp_path: Path) -> None:
    body = f"pathlib.Path({str(tmp_path)!r}, f'pid{{rank}}').write_text(str(os.getpid()))\n"
    body += "sys.exit(4) if rank == 1 else time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(script(tmp_path, body), 2, dict(os.environ))
    assert (caught.value.rank, caught.value.code) == (1, 4)
    assert time.monotonic() - began < 30
    assert not is_alive(int((tmp_path / "pid0").read_text()))


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"), 1, dict(os.environ))
    with pytest.raises(RankLost, match=r"rank 0 was ended by SIGKILL .* resumes from"):
        launch.explain(caught.value, tmp_path)
    with pytest.raises(RankLost, match=r"rank 1 did not answer .* resumes from"):
        launch.explain(RankError(1, None), tmp_path)
    with pytest.raises(RankLost, match=r"the ranks waited for each other .* resumes from"):
        launch.explain(RankError(0, RankLost.exit_code), tmp_path)
    assert launch.explain(RankError(0, 4), tmp_path) == 4
    assert launch.explain(RankError(0, 77), tmp_path) == 1
    assert launch.explain(RankError(1, -signal.SIGTERM), tmp_path) == 143


LAUNCHER = """
import os, signal, sys
from pipeline.ranks import run_ranks
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
run_ranks({command!r}, 2, dict(os.environ))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_their_launcher(number: signal.Signals, tmp_path: Path) -> None:
    body = f"folder = {str(tmp_path)!r}\n"
    body += "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(folder, f'told{rank}').touch(), sys.exit(1)))\n"
    body += "draft = pathlib.Path(folder, f'draft{rank}')\ndraft.write_text(str(os.getpid()))\n"
    body += "draft.rename(pathlib.Path(folder, f'pid{rank}'))\ntime.sleep(60)"
    source = LAUNCHER.format(command=script(tmp_path, body))
    launcher = subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "pid0", tmp_path / "pid1")
    launcher.send_signal(number)
    launcher.wait(timeout=30)
    assert launcher.returncode == {signal.SIGTERM: 143, signal.SIGINT: -2, signal.SIGKILL: -9}[number]
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))
    assert (tmp_path / "told0").exists() == (number != signal.SIGKILL)


def test_the_resolved_configuration_is_written_whole(tmp_path: Path) -> None:
    path = launch.write_config(config(tmp_path))
    assert path == tmp_path / "run" / "config.json"
    assert TrainConfig.model_validate_json(path.read_bytes()) == config(tmp_path)


def test_a_run_in_progress_keeps_its_configuration(tmp_path: Path) -> None:
    source = (
        f"import sys\nfrom manifests.storage import Store\nwith Store.open({str(tmp_path / 'run')!r}).lease('train'):\n"
        f"    open({str(tmp_path / 'held')!r}, 'w').close()\n    sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE)
    wait_for(tmp_path / "held")
    with pytest.raises(LeaseHeld):
        launch.write_config(config(tmp_path))
    assert not Store.open(tmp_path / "run").exists("config.json")
    holder.communicate(timeout=30)


def test_ranks_read_what_their_own_call_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a run has its lease another call may put its own configuration into the folder, before it is refused."""
    (tmp_path / "d.json").write_text("[]")
    own = config(tmp_path)
    read = []

    def ranks(command: list[str], _count: int, _environment: dict[str, str]) -> None:
        launch.write_config(own.model_copy(update={"seed": 7}))
        read.append(read_config(Path(command[3])))

    monkeypatch.setattr(launch, "run_ranks", ranks)
    for name in ("RANK", "WORLD_SIZE"):  # which DeepSpeed leaves behind, where a test before this one has trained
        monkeypatch.delenv(name, raising=False)
    launch.train(own)
    assert read == [own]


def save_marker(config: TrainConfig, phase: str, **changes: object) -> None:
    marker = {
        "step": 1,
        "final": True,
        "world_size": 1,
        "versions": {},
        "settings": settings_of(config, phase),
        **changes,
    }
    folder = config.phase_folder(phase) / "step_1"
    folder.mkdir(parents=True)
    (folder / MARKER).write_text(json.dumps(marker))


def test_a_finished_run_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text("[]")
    whole = config(tmp_path)
    save_marker(whole, "pretrain")
    assert launch.train(whole, phase="pretrain") == 0
    save_marker(whole, "instruct")
    assert launch.train(whole) == 0
    assert not (tmp_path / "run" / "config.json").exists(), "nothing was written, so no rank was started"


def test_another_configuration_is_refused_before_it_overwrites_the_first(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text("[]")
    whole = config(tmp_path)
    save_marker(whole, "pretrain", final=False)
    launch.write_config(whole)
    with pytest.raises(TrainingStopped, match="seed: 0 -> 7"):
        launch.train(whole.model_copy(update={"seed": 7}))
    assert TrainConfig.model_validate_json((tmp_path / "run" / "config.json").read_bytes()) == whole


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_a_folder_for_temporary_files_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    (tmp_path / "d.json").write_text("[]")
    monkeypatch.setattr("os.environ", {**os.environ, **environment})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match=r"cannot write the folder for temporary files \(TMPDIR\): no such file"):
        launch.train(config(tmp_path))


def test_a_rank_of_another_launcher_leaves_the_configuration_of_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.json").write_text("[]")
    whole = config(tmp_path)
    save_marker(whole, "pretrain", final=False)
    launch.write_config(whole)
    monkeypatch.setattr("os.environ", {**os.environ, "RANK": "0", "WORLD_SIZE": "1"})
    monkeypatch.setattr("train_stage.__main__.main", lambda _arguments: 11)
    assert launch.train(whole.model_copy(update={"seed": 7})) == 11
    assert TrainConfig.model_validate_json((tmp_path / "run" / "config.json").read_bytes()) == whole


def test_phases_after_the_one_asked_for_are_left_out(tmp_path: Path) -> None:
    whole = config(tmp_path)
    assert [phase.name for phase in launch.until_phase(whole, "pretrain").phases] == ["pretrain"]
    assert launch.until_phase(whole, "instruct") == whole
    with pytest.raises(RecipeError, match=r"^--phase align: the recipe's phases are pretrain, instruct$"):
        launch.until_phase(whole, "align")


def test_ranks_can_read_what_is_left_of_a_run_that_is_evaluated_on_its_last_phase_s_data(tmp_path: Path) -> None:
    """`eval: {}` means the validation data of the last phase, which an earlier phase need not have."""
    values = config(tmp_path).model_dump(mode="json")
    values["phases"][1]["validation"] = {"data": values["phases"][1]["data"]}
    whole = TrainConfig.model_validate({**values, "eval": {}})
    path = launch.write_config(launch.until_phase(whole, "pretrain"))
    assert read_config(path).eval is None
    assert launch.until_phase(whole, "instruct") == whole
    values["phases"][0]["validation"] = values["phases"][1]["validation"]
    both = TrainConfig.model_validate({**values, "eval": {"limit": 3}})
    assert launch.until_phase(both, "pretrain").eval == both.eval


def test_the_environment_finds_the_compiled_operations() -> None:
    found = launch.rank_environment({"PATH": "/usr/bin"})
    assert found["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    assert found["TORCH_EXTENSIONS_DIR"] == str(Path(sys.prefix) / "torch_extensions")
    assert launch.rank_environment({"TORCH_EXTENSIONS_DIR": "/x"})["TORCH_EXTENSIONS_DIR"] == "/x"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.PACKAGES, "train", ("torch", "no_such_package"))
    with pytest.raises(EnvironmentProblem, match=r"no_such_package is not installed; run: pip install 'asvr\[train\]'"):
        extras.require("train")
    with pytest.raises(EnvironmentProblem, match=r"pip install 'asvr\[train\]'"), extras.needs("train"):
        import no_such_package.part
    with pytest.raises(ModuleNotFoundError), extras.needs("tokenize"):
        import no_such_package  # noqa: F401


def test_training_without_data_is_one_line_and_4(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "train: " + json.dumps(config(tmp_path).model_dump(mode="json", exclude_none=True))
    )
    for extra in ({}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}):
        found = subprocess.run(
            [sys.executable, "-m", "pipeline", "train", str(tmp_path / "r.yaml")],
            capture_output=True, text=True, timeout=120, env=os.environ | extra,
        )  # fmt: skip
        assert found.returncode == 4, found.stderr
        errors = [line for line in found.stderr.splitlines() if "error:" in line]
        assert len(errors) == 1
        assert str(tmp_path / "d.json") in errors[0] or str(tmp_path / "lm") in errors[0] or str(tmp_path) in errors[0]
        assert "Traceback" not in found.stderr
