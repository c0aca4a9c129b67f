"""`asvr doctor` says what is there, names the remedy for what is not, and shows no secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECRET = "wJalrXUtnFEMI-not-a-real-one"  # noqa: S105


def doctor(*arguments: str, code: int = 0, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-m", "pipeline", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert found.returncode == code, found.stdout + found.stderr
    assert found.stderr == ""
    return found.stdout


def test_this_machine_can_do_both_stages(tmp_path: Path) -> None:
    said = doctor(HF_TOKEN=SECRET, AWS_SECRET_ACCESS_KEY=SECRET, AWS_ACCESS_KEY_ID=SECRET, ASVR_CACHE=str(tmp_path))
    assert SECRET not in said
    lines = {line[6:26].strip(): line for line in said.splitlines()}
    assert all(line.split()[0] in ("ok", "note") for line in said.splitlines())
    assert "deepspeed" in lines["train stage"]
    assert "ray" in lines["tokenize stage"]
    assert lines["hf:// access"] == f"ok    {'hf:// access':<20} HF_TOKEN is set"
    assert str(tmp_path) in lines["cache"]


def test_what_is_missing_is_named_with_its_remedy(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    said = json.loads(doctor("--json", code=9, **environment, HOME=str(tmp_path), HF_TOKEN=""))
    found = {finding["name"]: finding for finding in said["findings"]}
    assert found["compiler"]["health"] == "bad"
    assert "no-such-compiler" in found["compiler"]["said"]
    assert "apt-get install" in found["compiler"]["remedy"]
    assert found["hf:// access"]["health"] == "note"
    assert "HF_TOKEN" in found["hf:// access"]["remedy"]


def test_a_torch_that_cannot_be_imported_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    said = doctor(code=9, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert "libcudart.so.12" in next(line for line in said.splitlines() if " GPU " in line)


@pytest.mark.parametrize("variable", ["ASVR_CACHE", "TMPDIR"])
def test_a_folder_that_is_not_there_yet_is_judged_by_its_disk(tmp_path: Path, variable: str) -> None:
    (tmp_path / "there").mkdir()
    place = tmp_path / "there" if variable == "TMPDIR" else tmp_path / "not" / "there"
    assert f"GB free for {place}" in doctor(**{variable: str(place)})
