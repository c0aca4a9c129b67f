"""Strictness: which tensors a checkpoint must hold, which it may hold besides, and what to say otherwise. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from manifests.errors import InputError

SHOWN_KEYS = 6

Shape = tuple[int, ...]


def check_layout(
    found: Mapping[str, Sequence[int]],
    needed: Mapping[str, Sequence[int]],
    ignorable: Mapping[str, str],
    *,
    where: str,
) -> None:
    """Raise `InputError`, listing keys, unless every needed tensor is there and every other one may be.

    `found` and `needed`: key -> shape. `ignorable`: name of a group that is not used (`text tower`) -> regular
    expression that matches its keys as a whole. `where` names the checkpoint in the message.
    """
    missing = [key for key in needed if key not in found]
    groups = [re.compile(pattern) for pattern in ignorable.values()]
    unknown = [key for key in found if key not in needed and not any(group.fullmatch(key) for group in groups)]
    if missing:
        besides = f", and holds {len(unknown)} that are unknown ({shown(unknown)})" if unknown else ""
        raise InputError(
            f"{where} lacks {len(missing)} of the {len(needed)} tensors needed ({shown(missing)}){besides}: "
            "check that the file is whole and belongs to its configuration"
        )
    if unknown:
        raise InputError(
            f"{where} holds {len(unknown)} tensors that are neither needed nor part of what may be ignored "
            f"({shown(unknown)}; ignored: {', '.join(ignorable) or 'nothing'}): "
            "check that it is a checkpoint of this kind and belongs to its configuration"
        )
    wrong = [
        f"{key} is {_text(found[key])}, not {_text(shape)}"
        for key, shape in needed.items() if tuple(found[key]) != tuple(shape)
    ]  # fmt: skip
    if wrong:
        raise InputError(
            f"{where} holds {len(wrong)} tensors of another shape than its configuration says ({shown(wrong)}): "
            "give the configuration that it was trained with"
        )


def shown(names: Iterable[str]) -> str:
    """At most six names, and the count of the others."""
    listed = list(names)
    more = f", and {len(listed) - SHOWN_KEYS} more" if len(listed) > SHOWN_KEYS else ""
    return ", ".join(listed[:SHOWN_KEYS]) + more


def _text(shape: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
