"""A step of a recipe as `asvr plan` sees it: what it makes, how its output stands, and why, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from manifests.errors import AsvrError

Kind = Literal["codebook", "token set", "phase", "export", "eval"]

State = Literal["fresh", "stale", "missing", "interrupted", "running", "blocked"]
"""`fresh`: what the recipe asks for is there. `stale`: something else is. `missing`: nothing is. `interrupted`: a part is,
and the step goes on from it. `running`: someone is making it now. `blocked`: an input that no step makes is missing or bad.
"""

Changing = Mapping[str, str]
"""What the steps before a step will make anew: output folder -> what it is called."""


@dataclass(frozen=True)
class Step:
    """How one step stands. `replaces`: to bring it up to date takes away what is in `output`, which needs a yes."""

    kind: Kind
    name: str
    output: str
    state: State
    reasons: tuple[str, ...] = ()
    replaces: bool = False
    error: AsvrError | None = None

    @property
    def title(self) -> str:
        """What the step is called in a sentence."""
        return self.kind if self.kind in ("export", "eval") else f"{self.kind} {self.name}"

    @property
    def why(self) -> str:
        """The reasons on one line."""
        return "; ".join(self.reasons)

    def as_dict(self) -> dict[str, object]:
        """For a program."""
        return {
            "kind": self.kind,
            "name": self.name,
            "state": self.state,
            "reasons": list(self.reasons),
            "replaces": self.replaces,
            "output": self.output,
        }


def changing(steps: Iterable[Step]) -> dict[str, str]:
    """What the steps that are not fresh will make anew."""
    return {step.output: step.title for step in steps if step.state != "fresh"}


def in_words(differences: Sequence[str], words: Mapping[str, str]) -> tuple[str, ...]:
    """`manifests.fingerprint.differing_keys` as sentences, in their order, each said once.

    `words` has, for the beginning of a dotted name, what is said of it: a text that ends with ':' is followed by the two
    values. The longest beginning counts; a name that none fits is said as it is.
    """
    said: dict[str, None] = {}
    for difference in differences:
        name, _, values = difference.partition(": ")
        parts = re.split(r"[.\[]", name)
        beginnings = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        known = next((words[one] for one in beginnings if one in words), None)
        if known is None:
            said[f"{name} changed: {values}"] = None
        else:
            said[f"{known} {values}" if known.endswith(":") else known] = None
    return tuple(said)


def counted(number: int, noun: str) -> str:
    """`1 image`, `312 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
