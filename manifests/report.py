"""What a check of a token set reports: counts, and problems with codes that stay the same between versions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["complete", "in progress", "interrupted"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a stable code, the file it is about, and a sentence."""

    code: str
    path: str
    message: str


@dataclass(frozen=True)
class VerifyReport:
    """What a manifest says it holds, and everything found to be wrong with it."""

    images: int = 0
    ok: int = 0
    rejected: int = 0
    shards: int = 0
    fingerprint: str | None = None
    problems: list[Problem] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class StatusReport(VerifyReport):
    """The counts so far; `interrupted` means that running the job again goes on where it stopped.

    `owner` says who holds the lease while the state is `in progress`.
    """

    state: State = "complete"
    owner: str | None = None
