"""The command: instant help, documented exit codes, one line for an error, one object for a program."""

from __future__ import annotations

import io
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_sets import make_set

from manifests.errors import EXIT_CODES, AsvrError
from pipeline.console import MAX_TEXT, READER_GONE, plain
from pipeline.progress import ProgressLine, duration

ASVR = [sys.executable, "-m", "pipeline"]
VERBS = ["init", "schema", "tokenize", "fit-codebook", "train", "export", "status", "verify", "retry", "gc", "push", "manifest", "report", "inspect", "demo", "doctor", "exit-codes", "version"]  # fmt: skip
HEAVY = "{'torch', 'ray', 'transformers', 'deepspeed', 'pyarrow', 'numpy', 'PIL'}"


def asvr(*arguments: str | Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    found = subprocess.run(
        [*ASVR, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )
    assert found.returncode == code, found.stderr
    return found


def error_of(*arguments: str | Path, code: int) -> str:
    found = asvr(*arguments, code=code)
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1, found.stderr
    return found.stderr


@pytest.mark.parametrize(
    "verb", [[], *([verb] for verb in VERBS if verb != "demo")], ids=lambda v: " ".join(v) or "asvr"
)
def test_help_imports_nothing_heavy(verb: list[str]) -> None:
    script = (
        f"import sys\nfrom pipeline.cli import run\ncode = run({[*verb, '--help']!r})\n"
        f"heavy = {HEAVY} & {{name.partition('.')[0] for name in sys.modules}}\n"
        "sys.exit(code or ('imported ' + ', '.join(heavy) if heavy else 0))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert "Usage: asvr" in found.stdout


def test_help_takes_under_half_a_second_of_cpu() -> None:
    def spent() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        asvr("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(spent() for _ in range(3)) < 0.5


def test_exit_codes_are_one_table() -> None:
    lines = asvr("exit-codes").stdout.splitlines()
    assert [int(line.split()[0]) for line in lines] == list(EXIT_CODES)
    assert {kind.exit_code for kind in AsvrError.__subclasses__()} <= set(EXIT_CODES)
    assert READER_GONE in EXIT_CODES


def test_the_list_of_verbs_is_not_cut_at_80_columns() -> None:
    listed = asvr("--help", COLUMNS="80").stdout.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert {"exit-codes", *VERBS} <= {line.split()[0] for line in listed}
    assert [line for line in listed if not line.endswith(".") or line.endswith("...")] == []


def test_version() -> None:
    assert asvr("version").stdout.startswith("asvr 0.")


def test_wrong_usage_is_2() -> None:
    assert "nope" in asvr("nope", code=2).stderr
    assert "RECIPE" in asvr("tokenize", code=2).stderr
    assert "nproc" in asvr("train", "r.yaml", "--nproc", "0", code=2).stderr


@pytest.mark.parametrize("verb", ["tokenize", "fit-codebook", "train"])
def test_a_bad_recipe_is_one_line_and_3(verb: str, tmp_path: Path) -> None:
    assert "there is no such recipe file" in error_of(verb, tmp_path / "nothing.yaml", code=3)
    assert "is a folder" in error_of(verb, tmp_path, code=3)
    (tmp_path / "r.yaml").write_text("tokenize: {a: [1\n")
    assert "r.yaml:2: not valid YAML" in error_of(verb, tmp_path / "r.yaml", code=3)


def test_an_error_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text('tokenize: {}\n"\\e[2J\\nevil [red]x[/red] \\u202e\\x9b": 1\n')
    line = error_of("tokenize", tmp_path / "r.yaml", code=3)
    assert r"\x1b[2J\nevil [red]x[/red] \u202e\x9b" in line


def test_export_of_nothing_is_one_line(tmp_path: Path) -> None:
    assert "give the output folder of asvr train" in error_of("export", tmp_path, code=4)
    assert "neither a run nor an export" in error_of("eval", tmp_path, code=4)


@pytest.fixture(scope="module")
def token_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tokens"
    make_set(folder)
    return folder


@pytest.mark.parametrize("verb", ["status", "verify"])
def test_one_json_object(verb: str, token_set: Path) -> None:
    report = json.loads(asvr(verb, token_set, "--json").stdout)
    counts = {key: report[key] for key in ("images", "ok", "rejected", "shards")}
    assert counts == {"images": 16, "ok": 12, "rejected": 4, "shards": 3}
    assert all(type(value) is int for value in counts.values())
    assert len(report["fingerprint"]) == 64
    assert report["problems"] == []


def test_tables_for_people(token_set: Path) -> None:
    text = asvr("status", token_set).stdout
    assert [line.split() for line in text.splitlines()][1:5] == [
        ["state", "complete"],
        ["images", "16"],
        ["ok", "12"],
        ["rejected", "4"],
    ]
    assert "\x1b" not in text
    assert "problems     0" in asvr("verify", token_set).stdout


def test_verify_exits_8_and_names_what_is_damaged(tmp_path: Path) -> None:
    make_set(tmp_path / "tokens")
    shard = sorted((tmp_path / "tokens" / "shards").iterdir())[0]
    shard.write_bytes(b"\0" * shard.stat().st_size)
    report = json.loads(asvr("verify", tmp_path / "tokens", "--json", code=8).stdout)
    assert {"code", "path", "message"} == set(report["problems"][0])
    assert report["problems"][0]["path"] == f"shards/{shard.name}"
    text = asvr("verify", tmp_path / "tokens", code=8).stdout
    assert f"shards/{shard.name}" in text
    assert len(text.splitlines()) < 20, "a pipe has no width to fold at"


@pytest.mark.parametrize("verb", ["status", "verify"])
def test_a_folder_without_a_token_set_is_4(verb: str, tmp_path: Path) -> None:
    assert "no token set" in error_of(verb, tmp_path, code=4)


def test_a_reader_that_goes_away_is_quiet(token_set: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run([*ASVR, "verify", str(token_set)], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert found.returncode == READER_GONE
    assert b"Traceback" not in found.stderr
    assert b"Broken" not in found.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_their_code_and_no_traceback(number: signal.Signals, tmp_path: Path) -> None:
    started = tmp_path / "started"
    script = (
        "import pathlib, sys, time\nfrom pipeline import cli\n"
        f"@cli.app.command()\ndef wait():\n    pathlib.Path({str(started)!r}).touch()\n    time.sleep(60)\n"
        "sys.exit(cli.run(['wait']))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == f"error: {EXIT_CODES[128 + number]}\n"


def test_a_bug_shows_its_traceback() -> None:
    script = "import sys\nfrom pipeline import cli\n@cli.app.command()\ndef bug():\n    [][0]\ncli.app.info.name\nsys.argv = ['asvr', 'bug']\ncli.main()"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert "IndexError" in found.stderr


def test_plain_neutralises_and_shortens() -> None:
    assert plain("a\tb\nc\x1b[31m\x7f\x85\u2028\udcff") == r"a\tb\nc\x1b[31m\x7f\x85\u2028\udcff"
    assert plain("größe 日本 👩\u200d🚀") == "größe 日本 👩\u200d🚀"
    assert len(plain("x" * 10**6)) < MAX_TEXT + 40


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressLine("vqa", stream=stream, clock=clock) as line:
        for second in range(101):
            clock.now = float(second)
            line.update(1000 + second * 40, 5000, rejected=second // 50)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "vqa: 1,000/5,000 images (20%)"
    assert lines[5] == "vqa: 3,000/5,000 images (60%), 40.0 images/s, 1 rejected, ETA 50 s"
    assert lines[-1] == "vqa: 5,000/5,000 images (100%), 40.0 images/s, 2 rejected"


def test_a_terminal_gets_one_line_that_rewrites_itself() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream, ProgressLine("vqa \x1b[2J", stream=stream) as line:
        line.update(0, 10)
        line.update(10, 10)
    read = b""
    while not read.endswith(b"\n"):  # a terminal hands on what it has, which may be a part
        read += os.read(master, 4096)
    os.close(master)
    written = read.decode()
    assert written.startswith("\rvqa \\x1b[2J: 0/10 images (0%)\x1b[K\r")
    assert written.count("\n") == 1
    assert written.endswith("\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (270_000, "3 d 03 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
