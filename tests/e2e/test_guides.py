"""The commands of the two guides, run in their order by a user whose folder is small; and every command shown anywhere is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from users_folder import asvr, make_folder

from pipeline.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: str) -> list[list[str]]:
    """The lines of a page's `sh` blocks, as arguments of `asvr`."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert all(line.startswith("asvr ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


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
    lines = commands("data-engineer.md")
    assert len(lines) >= 15
    for arguments in lines:
        printed = asvr(*arguments, cwd=folder)
        if arguments[0] == "init":
            smaller(folder / "recipe.yaml")
        if arguments[:2] == ["verify", "tokens"]:
            assert "problems" in printed
    assert (folder / "merged" / "manifest.json").is_file()
    assert (folder / "tokens" / "report.html").is_file()


def test_the_guide_for_training_engineers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    asvr("fit-codebook", "recipe.yaml", cwd=folder)
    asvr("tokenize", "recipe.yaml", cwd=folder)
    lines = commands("training-engineer.md")
    assert len(lines) >= 8
    for arguments in lines:
        asvr(*arguments, cwd=folder)
    assert (folder / "run" / "export" / "config.json").is_file()
    assert (folder / "run" / "report.html").is_file()


def shown() -> list[str]:
    """Every `asvr ...` in the pages, as code in a sentence or as a line of its own, with page and number."""
    found = []
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            inline = re.findall(r"`(asvr [^`]*)`", line)
            own = re.match(r"\s*(?:\$ )?(asvr (?!in |is |has |.*brings it).*)$", line)
            found += [f"{page.name}:{number}: {text}" for text in inline + ([own[1]] if own else [])]
    return found


@pytest.mark.parametrize("line", sorted({line.partition(": ")[2] for line in shown()}))
def test_a_command_that_is_shown_exists(line: str) -> None:
    """Parsed by the command's own parser: verbs, options and the number of arguments; what is optional is given."""
    text = line.replace("\\|", "|").split("#")[0].split("   ")[0].removesuffix(" | sh")
    text = re.sub(r"\[([^\]]*)\]", r" \1 ", text).replace("...", " ").replace("…", " ")
    words = []
    for word in shlex.split(text)[1:]:
        # One of several: the first of them. A capital letter that stands for a number is one.
        chosen = word.split("|")[0]
        words.append("2" if chosen in ("N", "S", "K") else chosen)
    command: Any = get_command(app)
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"{line}: there is no {words[0]}"
        command = command.commands[words.pop(0)]
    named = [word for word in words if word.startswith("-")]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {name.split("=")[0] for name in named} <= options | {"--help", "-h"}, line
    if words and any(not word.startswith("-") for word in words):
        command.make_context("asvr", list(words))
