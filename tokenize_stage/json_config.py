"""Configuration files of published models: untrusted JSON, read value by value. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from manifests.errors import InputError


@dataclass(frozen=True)
class Settings:
    """A JSON object and where it stands, for messages. Every getter raises `InputError` naming the key."""

    values: Mapping[str, Any]
    where: str

    def section(self, key: str) -> Settings:
        """The object under `key`."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Settings(value, f"{self.where}: {key}")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a positive integer")
        return value

    def counts(self, key: str, length: int) -> tuple[int, ...]:
        """`length` positive integers; one integer stands for all of them."""
        value = self.values.get(key)
        listed = [value] * length if isinstance(value, int) else value
        if (
            not isinstance(listed, list)
            or len(listed) != length
            or not all(isinstance(item, int) and not isinstance(item, bool) and item > 0 for item in listed)
        ):
            raise self.wrong(key, f"{length} positive integers")
        return tuple(listed)

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.values.get(key)
        if not is_number(value):
            raise self.wrong(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """A text that is not empty."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise self.wrong(key, "a text")
        return value

    def wrong(self, key: str, wanted: str) -> InputError:
        """What to raise for a value that is not what it must be."""
        found = f"is {str(self.values[key])[:60]!r}, not {wanted}" if key in self.values else f"is missing ({wanted})"
        return InputError(f"{self.where}: {key} {found}: give the configuration the checkpoint was trained with")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def read_settings(file: Path) -> Settings:
    """The JSON object in `file`."""
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"the configuration {file} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: give the configuration the checkpoint was trained with") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} is not a JSON object: give the configuration the checkpoint was trained with")
    return Settings(value, str(file))
