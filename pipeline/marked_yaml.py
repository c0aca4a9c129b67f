"""Reading YAML that keeps the line of every key and value, and that a hostile file cannot make explode.

The dialect is the core schema of YAML 1.2 plus anchors, aliases and `<<` merges: `1e-3` is a number, `no` and `on`
are text, there are no dates, no tags of Python objects and no duplicate keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from manifests.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 40
MAX_VALUES = 50_000
"""Values a document may have once its aliases are written out; ten lines of nested aliases can ask for billions."""

Path = tuple[str | int, ...]
"""Where a value stands: mapping keys and list positions, from the top."""

_MAP, _SEQ, _MERGE = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:merge"
_INT = "tag:yaml.org,2002:int"
_SCALARS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))


@dataclass
class Marked:
    """Plain values (`dict`, `list`, `str`, `int`, `float`, `bool`, None) and the place each one was written."""

    value: Any = None
    marks: dict[Path, str] = field(default_factory=dict)
    """'recipe.yaml:12' or '--set a.b=c' of each value; for a value of a mapping, where its key stands."""

    def mark(self, path: Path) -> str:
        """The place of `path`, or of the nearest value around it that was written down."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path, "")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core types and a limit on nesting, which the parser recurses into."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - yaml's own protocol
    _nesting = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._nesting += 1
        if self._nesting > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"values are nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._nesting -= 1
        return node


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("merge", r"<<", "<"),
):
    _first_characters = [*_first, ""] if _tag == "null" else [*_first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first_characters)


def parse(text: str, name: str, *, mark: str | None = None) -> Marked:
    """Parse one YAML document. `name` stands in messages as 'name:line'; `mark`, when given, replaces 'name:line'.

    Raises RecipeError, one sentence, for a syntax error, a duplicate key, an unknown tag or a document over the limits.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{mark or name}: longer than {MAX_BYTES // 1024} KiB, which no recipe is")
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        marked = Marked()
        marked.value = _Builder(loader, name, mark, marked.marks).build(node, ())
    except yaml.MarkedYAMLError as error:
        # What is scanned, a key or a quoted text, is wrong where it begins; it is noticed lines later.
        scanned = error.context_mark if (error.context or "").startswith("while scanning") else None
        at = scanned or error.problem_mark or error.context_mark
        where = mark or (f"{name}:{at.line + 1}" if at else name)
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{where}: not valid YAML: {problem}{_remedy(problem)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        character = ord(error.character) if isinstance(error.character, str) else error.character
        raise RecipeError(f"{mark or f'{name}:{line}'}: the character U+{character:04X} is not allowed") from None
    finally:
        if loader is not None:
            loader.dispose()
    return marked


def _remedy(problem: str) -> str:
    """What to do about the two slips that YAML's own words do not name."""
    if "\\t" in problem:
        return "; indent with spaces, not tabs"
    return "; write `key: value`, with a space after the colon" if "could not find expected ':'" in problem else ""


class _Builder:
    """Turns a composed node graph into plain values, writing each alias out and counting what that makes."""

    def __init__(self, loader: _Loader, name: str, mark: str | None, marks: dict[Path, str]) -> None:
        self.loader, self.name, self.fixed_mark, self.marks = loader, name, mark, marks
        self.count = 0

    def where(self, node: yaml.Node) -> str:
        return self.fixed_mark or f"{self.name}:{node.start_mark.line + 1}"

    def build(self, node: yaml.Node | None, path: Path) -> Any:
        if node is None:
            return None
        self.count += 1
        # Depth is checked again because an alias to a value around it nests for ever.
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            where = self.marks.get(path[:1]) or self.where(node)
            raise RecipeError(f"{where}: its aliases make more than {MAX_VALUES} values, or refer to themselves")
        self.marks.setdefault(path, self.where(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
            return [self.build(item, (*path, position)) for position, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node)
        raise RecipeError(f"{self.where(node)}: the tag {node.tag!r} is not allowed in a recipe")

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            if node.tag == _INT and node.value.lstrip("+-").isdecimal():
                value: Any = int(node.value)  # SafeLoader would read a leading zero as octal, as YAML 1.1 did
            else:
                value = self.loader.construct_object(node)
        except (ValueError, KeyError):  # an explicit tag that does not fit, or an integer of thousands of digits
            value = math.nan
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{self.where(node)}: {node.value[:40]!r} cannot be read as its type")
        return value

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        own: set[str] = set()
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self._key(key_node)
            if key in own:
                raise RecipeError(f"{self.where(key_node)}: the key {key[:60]!r} is given twice")
            own.add(key)
            self.marks[(*path, key)] = self.where(key_node)
            result[key] = self.build(value_node, (*path, key))
        for merged in self._merged(node):
            for key_node, value_node in merged.value:
                if key_node.tag != _MERGE and (key := self._key(key_node)) not in result:
                    result[key] = self.build(value_node, (*path, key))
        return result

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or not isinstance(key := self._scalar(node), str):
            raise RecipeError(f"{self.where(node)}: a key must be text; put it in quotes")
        return key

    def _merged(self, node: yaml.MappingNode) -> Iterator[yaml.MappingNode]:
        """The mappings that `<<` names, nearest first; a merge inside a merged mapping is refused."""
        for key_node, value_node in node.value:
            if key_node.tag != _MERGE:
                continue
            targets = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for target in targets:
                if not isinstance(target, yaml.MappingNode) or any(key.tag == _MERGE for key, _ in target.value):
                    raise RecipeError(f"{self.where(key_node)}: '<<' takes plain mappings, without a '<<' of their own")
                yield target
