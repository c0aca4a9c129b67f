"""`asvr inspect`: the codes of one image, for people, terminals and programs, whatever it is called."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import made_report
import numpy as np
import pytest
from PIL import Image

from manifests.reader import open_manifest
from pipeline import cli
from pipeline.console import plain

NAMES = [made_report.harmless_name(text) for text in made_report.HOSTILE[:-1]] + made_report.HOSTILE[-1:]
ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\ufeff\u2028\u2029]")
"""What acts on a terminal or hides, but for the newline."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    made_report.save_set(folder / "tokens", folder / "images", 15, names=NAMES)
    return folder


def asvr(*arguments: str | Path, code: int = 0) -> str:
    """What the command says: on standard error where it fails."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        found = cli.run([*map(str, arguments)])
    assert found == code, err.getvalue()
    return err.getvalue() if code else out.getvalue()


def inspect(*arguments: str | Path, code: int = 0) -> str:
    return asvr("inspect", *arguments, code=code)


def test_by_id_and_by_a_copy_of_the_file(place: Path, tmp_path: Path) -> None:
    by_id = json.loads(inspect("shapes/0001.png", "--in", place / "tokens", "--json"))
    copy = shutil.copy(place / "images" / "shapes" / "0001.png", tmp_path / "copy.bin")
    assert json.loads(inspect(copy, "--in", place / "tokens", "--json")) == by_id
    opened = open_manifest(place / "tokens")
    (codes_VPD,) = opened.read_codes(["shapes/0001.png"])
    assert by_id["views"][0]["codes"] == codes_VPD[0].T.tolist()
    assert (by_id["shard"], by_id["row"]) == (opened.shards[0].path, 13)
    assert by_id["grid"] == list(made_report.GRID)
    assert len(by_id["views"][0]["box"]) == 4


def test_numbers_where_there_are_no_colours(place: Path) -> None:
    text = inspect("shapes/0002.png", "--in", place / "tokens")
    (codes_VPD,) = open_manifest(place / "tokens").read_codes(["shapes/0002.png"])
    block = text.split("view 0, depth 1\n")[1].split("\n\n")[0]
    numbers = [[int(code) for code in line.split()] for line in block.splitlines()]
    np.testing.assert_array_equal(numbers, codes_VPD[0, :, 1].reshape(made_report.GRID))
    assert re.search(r"^row +14, counted from 0, of 15$", text, re.MULTILINE)


def test_what_the_set_does_not_hold_is_one_sentence(place: Path, tmp_path: Path) -> None:
    tokens = place / "tokens"
    assert "did you mean shapes/0001.png?" in inspect("0001.png", "--in", tokens, code=4)
    assert "was rejected as missing" in inspect(f"bad {made_report.HOSTILE[0]}", "--in", tokens, code=4)
    (tmp_path / "other.png").write_bytes(b"other")
    assert "has the bytes of" in inspect(tmp_path / "other.png", "--in", tokens, code=4)
    assert "not UTF-8" in inspect("\udcff", "--in", tokens, code=4)


def test_the_picture_file_has_the_view_and_a_map_of_each_depth(place: Path, tmp_path: Path) -> None:
    inspect("shapes/0001.png", "--in", place / "tokens", "--png", tmp_path / "new" / "codes.png")
    with Image.open(tmp_path / "new" / "codes.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 4 * 256
        assert len(sheet.convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_no_name_and_no_caption_acts_on_a_log(place: Path, number: int) -> None:
    tokens = place / "tokens"
    for extra in ([], ["--json"]):
        text = inspect(NAMES[number], "--in", tokens, *extra)
        assert not ACTING.search(text)
        assert len(text) < 40_000
    asked = json.loads(text)
    assert asked["image_id"] == NAMES[number]
    assert asked["carried"] == {"caption": made_report.HOSTILE[number]}
    refused = inspect(f"bad {made_report.HOSTILE[number]}".replace("\0", ""), "--in", tokens, code=4)
    assert not ACTING.search(refused)
    assert refused.count("\n") == 1


@pytest.mark.parametrize("verb", [["status"], ["verify"], ["verify", "--json"], ["report"]])
def test_other_verbs_on_the_same_set(place: Path, verb: list[str]) -> None:
    text = asvr(verb[0], place / "tokens", *verb[1:])
    assert text
    assert not ACTING.search(text)


def test_a_terminal_gets_colours_and_nothing_else_that_acts(place: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "pipeline", "inspect", NAMES[6], "--in", str(place / "tokens")]
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux's way to say that nobody has the other end any more
            break
        if not part:
            break
        written += part
    os.close(leader)
    assert process.wait(60) == 0
    text = written.decode()
    assert text.count("\u2580") == made_report.GRID[0] // 2 * made_report.GRID[1] * len(made_report.SIZES)
    assert "\x1b[38;2;" in text
    without_colours = re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r\n", "\n")
    assert not ACTING.search(without_colours)
    assert plain(NAMES[6])[:20] in without_colours
