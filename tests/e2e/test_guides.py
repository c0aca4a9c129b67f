"""The commands of the pages, run in a user's folder that is small: the two guides in their order, then all others."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from pages import ROOT, blocks, guide, is_mention, options, options_in_sentences, shown, verb, words
from typer.main import get_command
from users_folder import BEFORE_THE_SECOND_GUIDE, PICTURES, asvr, make_folder

from pipeline.cli import app

BESIDE_THE_GUIDES = [
    "exit-codes",
    "init talks.json --output another.yaml",
    "schema",
    "plan recipe.yaml --json",
    "tokenize recipe.yaml --set tokenize.pictures.engine=ray --submit http://127.0.0.1:8265 --dry-run",
    "train recipe.yaml --check --gpus 8 --gpu H100 --mfu 0.4",
    "train recipe.yaml --set train.output=short --phase pretrain --nproc 1 --max-steps 1 --time-limit 5",
    "eval run",
    "eval run/export --data talks.json --image-root images --limit 2 --out measured",
    "eval run/export --lmms-eval --processes 2",
    "export run --push-to-hub someone/llava --private",
    "push tokens --to someone/tokens",
    "report run --with short",
    "report tokens --images 1000 --to page.html",
    "inspect images/3.png --in tokens --png map.png",
    "inspect 3.png --in tokens --json",
    "status tokens --json",
    "manifest filter tokens --ids ids --output few",
    "manifest filter tokens --exclude-ids ids --output others",
    "manifest merge few others --output whole",
    "manifest forget whole 5.png --ids ids --purge",
    "retry tokens --reason missing --set max_pixels=500000000",
    "gc tokens",
    "gc tokens --older-than 1h --keep-snapshots 1",
    "verify tokens --rebuild",
    "verify tokens --rebuild --like kept.json",
    "run recipe.yaml --replace",
]
ELSEWHERE = {
    "demo": "tests/e2e/test_demo.py",
    "tokenize --submit": "tests/tokenize_stage/test_ray_addresses.py",
    "run --submit": "tests/tokenize_stage/test_ray_addresses.py",
}
"""What other tests run: the verb and an option of it, and where."""


def smaller(recipe: Path) -> None:
    """The recipe that `asvr init` wrote, with codebooks as tiny as the tower: what its comments tell a user to decide."""
    text = recipe.read_text()
    for old, new in {
        "size: 256 ": "size: 8 ",
        "depth: 8": "depth: 3",
        "layer: -2}": "layer: 2}",
    }.items():
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text.replace("    output: tokens\n", "    output: tokens\n    unit_size: 5\n    batch_size: 4\n"))


def test_the_guide_for_data_engineers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "recipe.yaml").unlink()
    lines = guide("data-engineer.md")
    assert len(lines) >= 15
    for arguments in lines:
        printed = asvr(*arguments, cwd=folder)
        if arguments[0] == "init":
            smaller(folder / "recipe.yaml")
        if arguments[:2] == ["verify", "tokens"]:
            assert "problems" in printed
    assert (folder / "merged" / "manifest.json").is_file()
    assert (folder / "tokens" / "report.html").is_file()


def test_the_guide_for_training_engineers(trained: Path) -> None:
    assert len(guide("training-engineer.md")) >= 8
    assert (trained / "run" / "export" / "config.json").is_file()
    assert (trained / "run" / "report.html").is_file()


def test_the_commands_beside_the_guides(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (trained / "ids").write_text("3.png\n4.png\n")
    shutil.copy(trained / "tokens" / "manifest.json", trained / "kept.json")
    with HubServer() as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        printed = {line: asvr(*line.split(), cwd=trained) for line in BESIDE_THE_GUIDES}
        assert "manifest.json" in hub.repositories["datasets/someone/tokens"]
        assert "config.json" in hub.repositories["models/someone/llava"]
    assert "nothing" in printed["run recipe.yaml --replace"]


def test_shards_are_read_as_the_page_of_formats_shows(trained: Path) -> None:
    """But for the number of depths, 8 on the page."""
    page = ROOT / "docs" / "formats.md"
    (python,), (sql,) = blocks(page, "python"), blocks(page, "sql")
    assert "% 8 " in sql
    sql = sql.replace("% 8 ", "% 3 ")
    script = f"{python}\nimport duckdb\nfound = duckdb.sql({sql!r}).fetchall()\nprint(table.num_rows, sum(n for _, n in found))"
    read = [sys.executable, "-c", script]
    printed = subprocess.run(read, cwd=trained, capture_output=True, text=True, check=True).stdout
    assert printed == f"5 {PICTURES * 16}\n"  # the first unit's images; a code of depth 0 at each position


def test_every_command_and_option_on_a_page_is_run_by_a_test() -> None:
    """A shown command needs a line with its very options, with what stands in brackets and without; a mention one with more."""
    lines = [*map(str.split, BEFORE_THE_SECOND_GUIDE + BESIDE_THE_GUIDES + list(ELSEWHERE))]
    run: dict[str, list[set[str]]] = {}
    for arguments in [*lines, *guide("data-engineer.md"), *guide("training-engineer.md")]:
        run.setdefault(verb(arguments), []).append(options(arguments))
    missing = []
    for text, place in shown().items():
        for arguments in (words(text), words(text, given=False)):
            named, known = options(arguments), run.get(verb(arguments), [])
            if not (any(named <= line for line in known) if is_mention(arguments) else named in known):
                missing.append(f"{place}: {text}")
    every = set().union(*itertools.chain(*run.values()))
    missing += [f"{place}: {option}" for option, place in options_in_sentences().items() if option not in every]
    assert not missing, "no test runs " + "; ".join(dict.fromkeys(missing))
    for line, file in ELSEWHERE.items():
        text = (ROOT / file).read_text()
        assert all(f'"{word}"' in text for word in line.split()), f"{file} does not run {line}"


@pytest.fixture(scope="module")
def every_command() -> Any:
    return get_command(app)


@pytest.mark.parametrize("line", sorted(shown()))
def test_a_command_that_is_shown_exists(every_command: Any, line: str) -> None:
    """Parsed by the command's own parser: verbs, options and the number of arguments; what is optional is given."""
    # A capital letter that stands for a number is one.
    rest = ["2" if word in ("N", "S", "K") else word for word in words(line)]
    command = every_command
    while hasattr(command, "commands") and rest:
        assert rest[0] in command.commands, f"{line}: there is no {rest[0]}"
        command = command.commands[rest.pop(0)]
    named = [word for word in rest if word.startswith("-")]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {name.split("=")[0] for name in named} <= known | {"--help", "-h"}, line
    if rest and any(not word.startswith("-") for word in rest):
        command.make_context("asvr", list(rest))
