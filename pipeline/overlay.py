"""Values put into a recipe by dotted key: by `--set` on the command line, and by the `set:` of a recipe that extends another.

One mechanism for both: a value replaces what stood there, whole, and remembers where it was written.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from manifests.errors import RecipeError
from pipeline.marked_yaml import Marked, Path

EXTENDS, SET = "extends", "set"
"""The two top-level keys of a recipe that changes another one."""


def put(marked: Marked, dotted: str, given: Any, marks: dict[Path, str], flag: str) -> None:
    """Put the value `given` at `dotted` into `marked`, and the places where it and its parts were written (`marks`).

    List elements are named by number, or by their `name`; mappings on the way that are not there are made. `flag` is
    what messages begin with. Raises RecipeError for a key that leads nowhere.
    """
    keys = dotted.strip().split(".")
    if not all(keys):
        raise RecipeError(f"{flag}: expected dotted.key=value, as in --set tokenize.vqa.unit_size=128")
    at: Path = ()
    value = marked.value
    for depth, key in enumerate(keys):
        if isinstance(value, list):
            part: str | int = _element(value, key, f"{flag}: {'.'.join(keys[:depth])}")
        elif isinstance(value, dict):
            part = key
        else:
            raise RecipeError(f"{flag}: {'.'.join(keys[:depth])} is {short(value)} and has no keys to set")
        at = (*at, part)
        if depth == len(keys) - 1:
            value[part] = given
        elif isinstance(value, dict) and value.get(key) is None:
            value[part] = {}
            marked.marks[at] = marks.get((), flag)
        value = value[part]
    for old in [path for path in marked.marks if path[: len(at)] == at]:
        del marked.marks[old]
    marked.marks.update({(*at, *path): mark for path, mark in marks.items()})
    marked.marks.setdefault(at, flag)


def put_all(base: Marked, overlay: Marked, name: str) -> Marked:
    """`base` with the `set:` of `overlay` put into it, in order; RecipeError for anything else beside it.

    The marks of `base` stay, so an error in it still names its own file and line.
    """
    for key in overlay.value:
        if key not in (EXTENDS, SET):
            raise RecipeError(
                f"{overlay.mark((key,))}: {short(key)}: a recipe that extends another has nothing but extends and set; "
                f"put it under set, as dotted.key: value"
            )
    values = overlay.value.get(SET)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(f"{overlay.mark((SET,))}: set: must be a mapping of dotted keys to values")
    for dotted, given in values.items():
        here: Path = (SET, dotted)
        marks = {path[2:]: mark for path, mark in overlay.marks.items() if path[:2] == here}
        put(base, dotted, given, marks, f"{overlay.mark(here) or name}: set.{short(dotted)}")
    return base


def _element(values: list[Any], key: str, where: str) -> int:
    names = [value.get("name") if isinstance(value, dict) else None for value in values]
    if key in names:
        return names.index(key)
    if key.isascii() and key.isdecimal() and int(key[:9]) < len(values):
        return int(key)
    known = [name for name in names if isinstance(name, str)]
    raise RecipeError(f"{where} has {len(values)} elements and none is {short(key)}; {choices(key, known)}")


def choices(wrong: str, names: Sequence[str]) -> str:
    """What a wrong name may have been meant for, else all the names there are."""
    close = difflib.get_close_matches(wrong[:100], names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"it has {', '.join(map(short, names))}" if names else "there are none"


def short(value: Any, limit: int = 80) -> str:
    """`value` for a message: text as it is, anything else as Python writes it, cut to `limit` characters."""
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    if value is None:
        return "empty"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
