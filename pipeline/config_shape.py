"""Walking raw values beside the pydantic model they are meant for: which keys may stand where, which text is a path."""

from __future__ import annotations

import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from manifests.paths import Location
from pipeline.marked_yaml import Path

Locate = Callable[[str, Location, Path], str]
"""(text, what it may name, where it stands) -> the resolved text."""


def resolve_locations(annotation: Any, value: Any, at: Path, locate: Locate) -> Any:
    """A copy of `value` in which every text that `annotation` declares to be a location went through `locate`.

    Values of the wrong shape are copied as they are: saying what is wrong with them is the model's part.
    """
    if isinstance(value, dict):
        fields = _members(annotation, value)
        return {key: resolve_locations(fields(key), item, (*at, key), locate) for key, item in value.items()}
    if isinstance(value, list):
        item_type = _item(annotation)
        return [resolve_locations(item_type, item, (*at, number), locate) for number, item in enumerate(value)]
    if isinstance(value, str) and (location := _location(annotation)) is not None:
        return locate(value, location, at)
    return value


def known_keys(annotation: Any, value: Any, path: Path) -> list[str]:
    """The keys that the model found at `path` inside `annotation` has; none where keys are free or it is no model."""
    for part in path:
        if isinstance(value, dict):
            annotation, value = _members(annotation, value)(str(part)), value.get(str(part))
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            annotation, value = _item(annotation), value[part]
        else:
            return []
    model = _model(annotation, value)
    return list(model.model_fields) if model else []


def _alternatives(annotation: Any) -> Iterator[Any]:
    """`annotation`, or the members of the union it is, with `Annotated` left around a marked text only."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _alternatives(member)
    elif origin is Annotated and not any(isinstance(mark, Location) for mark in get_args(annotation)[1:]):
        yield from _alternatives(get_args(annotation)[0])
    else:
        yield annotation


def _model(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The model that `value` is for: of a union, the one whose literal fields (`kind`) the value agrees with."""
    models = [a for a in _alternatives(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
    if len(models) > 1 and isinstance(value, dict):
        models = [model for model in models if _agrees(model, value)]
    return models[0] if len(models) == 1 else None


def _agrees(model: type[BaseModel], value: dict[str, Any]) -> bool:
    return all(
        value.get(name, field.default) in get_args(field.annotation)
        for name, field in model.model_fields.items()
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
    )


def _members(annotation: Any, value: dict[str, Any]) -> Callable[[str], Any]:
    """From a key of `value` to the annotation of what stands under it."""
    model = _model(annotation, value)
    if model is not None:
        fields = model.model_fields

        def of_field(key: str) -> Any:
            if key not in fields:
                return Any
            marks = [mark for mark in fields[key].metadata if isinstance(mark, Location)]
            return Annotated[fields[key].annotation, marks[0]] if marks else fields[key].annotation

        return of_field
    values = next((get_args(a)[1] for a in _alternatives(annotation) if get_origin(a) is dict), Any)
    return lambda _key: values


def _item(annotation: Any) -> Any:
    return next((get_args(a)[0] for a in _alternatives(annotation) if get_origin(a) in (list, tuple)), Any)


def _location(annotation: Any) -> Location | None:
    for alternative in _alternatives(annotation):
        if get_origin(alternative) is Annotated:
            return next(mark for mark in get_args(alternative)[1:] if isinstance(mark, Location))
        if isinstance(alternative, type) and issubclass(alternative, pathlib.PurePath):
            return Location.LOCAL
    return None
