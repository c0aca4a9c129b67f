"""What the pages show: the lines of a guide, every `asvr ...` anywhere, and every option that a page names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PROGRAMS = {"benchmarks.md", "search.md"}
"""Pages whose options in sentences are those of `python -m benchmarks...`."""


def blocks(page: Path, language: str) -> list[str]:
    """The texts of a page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def guide(page: str) -> list[list[str]]:
    """The lines of a page's `sh` blocks, as arguments of `asvr`."""
    lines = [line for block in blocks(ROOT / "docs" / page, "sh") for line in block.splitlines() if line.strip()]
    assert all(line.startswith("asvr ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


def shown() -> dict[str, str]:
    """Every `asvr ...` of the pages, as code in a sentence or as a line of its own, with the place of one of them."""
    found = {}
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            inline = re.findall(r"`(asvr [^`]*)`", line)
            own = re.match(r"\s*(?:\$ )?(asvr (?!in |is |has |.*brings it).*)$", line)
            found |= dict.fromkeys(inline + ([own[1]] if own else []), f"{page.name}:{number}")
    return found


def options_in_sentences() -> dict[str, str]:
    """Every `--option` that a page names outside a command, with the place of one of them."""
    found = {}
    for page in PAGES:
        if page.name not in OTHER_PROGRAMS:
            for number, line in enumerate(page.read_text().splitlines(), 1):
                for text in re.findall(r"`(--[^`]*)`", line):
                    found |= dict.fromkeys(options(shlex.split(text)), f"{page.name}:{number}")
    return found


def words(line: str, *, given: bool = True) -> list[str]:
    """The arguments of a shown `asvr ...`: what is optional is `given` or not, and one of several is the first of them."""
    text = line.replace("\\|", "|").split("#")[0].split("   ")[0]
    text = re.sub(r"\[([^\]]*)\]", r" \1 " if given else " ", text).replace("...", " ").replace("…", " ")
    return [word.split("|")[0] for word in shlex.split(text)[1:]]


def is_mention(arguments: list[str]) -> bool:
    """Whether a verb is only spoken of, with or without options: nothing is said to do it to."""
    rest = arguments[len(verb(arguments).split()) :]
    return not rest or rest[0].startswith("--")


def verb(arguments: list[str]) -> str:
    """`manifest merge` and its like are two words, all others one."""
    return " ".join(arguments[: 2 if arguments[0] == "manifest" else 1])


def options(arguments: list[str]) -> set[str]:
    """The names of the options among the arguments."""
    return {word.split("=")[0] for word in arguments if word.startswith("--")}
