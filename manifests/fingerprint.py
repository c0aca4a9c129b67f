"""Hash everything that can change a code, and say what differs when two hashes do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from manifests.errors import FingerprintMismatch

_SHOWN_VALUE = 60
_SHOWN_KEYS = 8


def canonical_json(obj: Any) -> bytes:
    """One byte string per JSON value: keys sorted, no spaces, ASCII only (file names may hold lone surrogates).

    Tuples count as lists. Raises `ValueError` on NaN and infinity and `TypeError` on what JSON cannot hold.
    """
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def digest(obj: Any) -> str:
    """sha256, in hex, of the canonical JSON of `obj`."""
    return hashlib.sha256(canonical_json(obj)).hexdigest()


def fingerprint(keys: Mapping[str, Any]) -> str:
    """The fingerprint of a token set: the digest of everything meant to change a code."""
    return digest(dict(keys))


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Each place where two key sets differ, as `dotted.name: value in a -> value in b`, sorted by name.

    Empty exactly when the fingerprints are equal. A key that one side lacks shows as `(absent)`.
    """
    found: list[str] = []
    _compare("", a, b, found)
    return found


def check_same(existing: Mapping[str, Any], wanted: Mapping[str, Any], *, where: str) -> None:
    """Raise `FingerprintMismatch`, naming the keys, unless both key sets have one fingerprint."""
    names = differing_keys(existing, wanted)
    if not names:
        return
    more = f", and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
    raise FingerprintMismatch(
        f"{where} holds codes made with other settings ({'; '.join(names[:_SHOWN_KEYS])}{more}): "
        "choose another output folder, restore the settings, or use --replace"
    )


_ABSENT = object()


def _compare(name: str, a: Any, b: Any, found: list[str]) -> None:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}):
            _compare(f"{name}.{key}" if name else key, a.get(key, _ABSENT), b.get(key, _ABSENT), found)
    elif a is _ABSENT or b is _ABSENT or canonical_json(a) != canonical_json(b):
        found.append(f"{name}: {_show(a)} -> {_show(b)}")


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = canonical_json(value).decode("ascii")
    return text if len(text) <= _SHOWN_VALUE else text[: _SHOWN_VALUE - 3] + "..."
