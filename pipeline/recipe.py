"""The recipe: one YAML file that describes a whole run, composed of the stages' own configuration models.

Top-level keys: `codebooks:` (name -> CodebookConfig), `tokenize:` (name -> TokenSetConfig), `train:` (TrainConfig); or
`extends:` (another recipe of the folder) and `set:` (dotted key -> value), which is that recipe with these values put in.
Only the models that a command needs are imported. Every error is one sentence that starts with 'file:line: dotted.key'.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import unquote

from pydantic import BaseModel, ValidationError

from manifests.errors import RecipeError
from manifests.paths import Location
from pipeline.config_shape import known_keys, resolve_locations
from pipeline.marked_yaml import MAX_BYTES, Marked, Path, parse
from pipeline.overlay import EXTENDS, choices, put, put_all, short

if TYPE_CHECKING:
    from tokenize_stage.config import CodebookConfig, TokenSetConfig
    from train_stage.config import TrainConfig

SECTIONS = ("codebooks", "tokenize", "train")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_WANTED = {
    "model_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "too_short": "needs at least one element",
    "string_type": "must be text",
    "path_type": "must be a path",
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
}
"""Sentences for the pydantic errors whose own words are about Python."""

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe, `--set` applied; each method checks and returns one part of it. All raise RecipeError."""

    file: FilePath
    marked: Marked

    def token_sets(self, only: Sequence[str] = ()) -> dict[str, TokenSetConfig]:
        """The token sets named in `only`, in the recipe's order; all of them when it is empty."""
        from tokenize_stage.config import TokenSetConfig

        sets = {name: self._build(TokenSetConfig, ("tokenize", name)) for name in self._select("tokenize", only)}
        self._distinct_outputs("tokenize")
        return sets

    def codebooks(self, only: Sequence[str] = ()) -> dict[str, CodebookConfig]:
        """The codebooks named in `only`, in the recipe's order; all of them when it is empty."""
        from tokenize_stage.config import CodebookConfig

        found = {name: self._build(CodebookConfig, ("codebooks", name)) for name in self._select("codebooks", only)}
        self._distinct_outputs("codebooks")
        return found

    def train(self) -> TrainConfig:
        """The training run, its `manifests` that name token sets replaced by those sets' output folders."""
        from train_stage.config import TrainConfig

        if self.marked.value.get("train") is None:
            raise RecipeError(f"{self.file} has no train: section, so there is nothing to train")
        return self._build(TrainConfig, ("train",))

    def has(self, section: str) -> bool:
        """Whether the recipe has something in a section."""
        return bool(self.marked.value.get(section))

    def _section(self, name: str) -> dict[str, Any]:
        section = self.marked.value.get(name)
        if section is None:
            return {}
        if not isinstance(section, dict):
            self.refuse((name,), "must be a mapping of names to settings")
        return section

    def _select(self, section: str, only: Sequence[str]) -> list[str]:
        names = list(self._section(section))
        if not names:
            raise RecipeError(f"{self.file} has no {section}: section, so there is nothing to do")
        for name in only:
            if name not in names:
                raise RecipeError(f"--only {name}: {self.file} has no such entry in {section}:; {choices(name, names)}")
        return [name for name in names if not only or name in only]

    def _distinct_outputs(self, section: str) -> None:
        seen: dict[str, str] = {}
        for name, settings in self._section(section).items():
            output = settings.get("output") if isinstance(settings, dict) else None
            if isinstance(output, str):
                place = output.rstrip("/") if "://" in output else str(self._absolute(output).resolve())
                other = seen.setdefault(place, name)
                if other != name:
                    self.refuse((section, name, "output"), f"is the output of {other} too; give each its own folder")

    def _build(self, model: type[Model], at: Path) -> Model:
        raw = self.marked.value
        for part in at:
            raw = raw[part]
        resolved = resolve_locations(model, raw, at, self._locate)
        try:
            return model.model_validate(resolved)
        except ValidationError as error:
            details = error.errors(include_url=False)
            details.sort(key=lambda detail: detail["type"] != "extra_forbidden")  # a typo explains a missing key
            path, sentence = _describe(details[0], model, raw)
            count = len(details) - 1
            more = f" (and {count} more problem{'s' if count > 1 else ''})" if count else ""
            self.refuse((*at, *path), sentence + more)

    def _locate(self, text: str, location: Location, at: Path) -> str:
        if location is Location.MANIFEST:
            sets = self._section("tokenize")
            if text in sets:
                output = sets[text].get("output") if isinstance(sets[text], dict) else None
                if not isinstance(output, str):
                    self.refuse(at, f"the token set {text} has no output folder")
                return self._locate(output, Location.STORE, ("tokenize", text, "output"))
            if re.fullmatch(r"[\w-]+", text) and not (self.file.parent / text).exists():
                self.refuse(at, f"there is neither a token set nor a folder {text!r}; {choices(text, list(sets))}")
        if not text.strip() or "\0" in text:
            self.refuse(at, "a path cannot be empty or hold a NUL character")
        if text.startswith("file:///"):
            text = unquote(text.removeprefix("file://"))
        if location is Location.HUB and text.startswith("hf://"):
            return text
        if "://" in text:
            if location not in (Location.STORE, Location.MANIFEST):
                self.refuse(at, f"{short(text)} is not on a local disk, where this has to be")
            return self._url(text, at)
        path = self._absolute(text)
        if location is Location.HUB and _HUB_ID.fullmatch(text) and not path.exists():
            return text
        return str(path)

    def _url(self, text: str, at: Path) -> str:
        """A URL as it is; one with credentials is refused, and they are not repeated."""
        if "@" in text.partition("://")[2].partition("/")[0]:
            mark = self.marked.mark(at) or str(self.file)
            where = "--set" if mark.startswith("--set") else mark  # which would repeat them
            dotted = ".".join(map(str, at))
            raise RecipeError(f"{where}: {dotted}: a URL must not hold credentials; set them in the environment")
        return text.rstrip("/")

    def _absolute(self, text: str) -> FilePath:
        """The path that `text` means, seen from the recipe's folder: `..` taken out, links not followed."""
        return FilePath(os.path.abspath(self.file.parent / os.path.expanduser(text)))  # noqa: PTH100, PTH111

    def refuse(self, path: Path, sentence: str) -> NoReturn:
        """Raise RecipeError: what `sentence` says of the value at `path`."""
        dotted = ".".join(short(part) if isinstance(part, str) else str(part) for part in path)
        where = self.marked.mark(path) or str(self.file)
        said = where.startswith(f"--set {dotted}=")
        raise RecipeError(f"{where}: {sentence}" if said else f"{where}: {dotted}: {sentence}")


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path` and apply `overrides`, each 'dotted.key=value' with a value in YAML.

    Checks syntax and the top-level keys; the sections are checked when they are asked for. Raises RecipeError.
    """
    file = FilePath(path)
    marked = _parse(file)
    recipe = Recipe(file, marked)
    for override in overrides:
        _override(marked, override)
    for key in marked.value:
        if key not in SECTIONS:
            recipe.refuse((key,), f"unknown key; {choices(key, SECTIONS)}")
    return recipe


def _parse(file: FilePath, extending: tuple[FilePath, ...] = ()) -> Marked:
    """The recipe in `file`; with `extends:`, the recipe beside it that is named there, changed as `set:` says."""
    marked = parse(_read(file), str(file))
    if marked.value is None:
        raise RecipeError(f"{file} is empty; a recipe has the keys {', '.join(SECTIONS)}")
    if not isinstance(marked.value, dict):
        raise RecipeError(f"{file}:1: a recipe is a mapping with the keys {', '.join(SECTIONS)}")
    if EXTENDS not in marked.value:
        return marked
    name, where = marked.value[EXTENDS], marked.mark((EXTENDS,))
    # Of the same folder, so that relative paths in both mean the same.
    if not isinstance(name, str) or FilePath(name).name != name:
        raise RecipeError(f"{where}: extends: must be the name of a recipe in the same folder, but is {short(name)}")
    base = file.parent / name
    if base in (file, *extending):
        raise RecipeError(f"{where}: extends: {name} extends itself in the end")
    if not base.is_file():
        raise RecipeError(f"{where}: extends: there is no recipe {short(name)} beside it")
    return put_all(_parse(base, (file, *extending)), marked, str(file))


def _read(file: FilePath) -> str:
    try:
        if file.is_dir():
            raise RecipeError(f"{file} is a folder; give the recipe file itself")
        if file.exists() and not file.is_file():
            raise RecipeError(f"{file} is not a regular file; give a recipe in YAML")
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{file}: there is no such recipe file") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{short(str(file))}: the recipe cannot be read: {error}") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{file} is longer than {MAX_BYTES // 1024} KiB, which no recipe is")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{file}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from None


def _override(marked: Marked, override: str) -> None:
    """Put the value of one --set into `marked`."""
    flag = f"--set {short(override)}"
    dotted, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"{flag}: expected dotted.key=value, as in --set tokenize.vqa.unit_size=128")
    given = parse(text, "", mark=flag)
    put(marked, dotted, given.value, given.marks, flag)


def _describe(detail: Any, model: type[BaseModel], raw: Any) -> tuple[Path, str]:
    """Where a pydantic error stands in the raw values, and what it says in the words of a recipe."""
    path: Path = ()
    value = raw
    for part in detail["loc"]:  # holds names of union members too, which no recipe holds
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        ):
            path, value = (*path, part), value[part]
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        present = known_keys(model, raw, path[:-1])
        key, colon, _ = str(path[-1]).partition(":")
        if colon and key in present:
            return path, f"unknown key; write a space after the colon of {key}:"
        return path, f"unknown key; {choices(str(path[-1]), present)}"
    if kind == "missing":
        return (*path, str(detail["loc"][-1])), "required key is missing"
    if kind == "union_tag_not_found":
        return (*path, context["discriminator"].strip("'")), "required key is missing"
    if kind == "union_tag_invalid":
        key = context["discriminator"].strip("'")
        return (*path, key), f"{short(context['tag'])} is not one of {context['expected_tags']}"
    if kind == "value_error":
        return path, str(context["error"])
    wanted = _WANTED.get(kind) or detail["msg"][0].lower() + detail["msg"][1:]
    return path, f"{wanted.replace('input should', 'must')}, but is {short(detail['input'])}"
