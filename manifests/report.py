"""What a check of a token set reports: counts, and problems with codes that stay the same between versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from manifests.live import JobProgress
from manifests.schema import Numerics

State = Literal["complete", "in progress", "interrupted"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a stable code, the file it is about, and a sentence."""

    code: str
    path: str
    message: str


@dataclass(frozen=True)
class VerifyReport:
    """What a manifest says it holds, and everything found to be wrong with it. `notes` are worth knowing, and no fault."""

    images: int = 0
    ok: int = 0
    rejected: int = 0
    shards: int = 0
    fingerprint: str | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class StatusReport(VerifyReport):
    """The counts so far; `interrupted` means that running the job again goes on where it stopped.

    `owner` says who holds the lease while the state is `in progress`. `progress` is what that job last wrote about itself,
    `progress_age` seconds ago; of a job that was interrupted it is what is committed, and None where there is an older
    manifest, which the counts are of.
    """

    state: State = "complete"
    owner: str | None = None
    progress: JobProgress | None = None
    progress_age: float | None = None


def mixed_devices(numerics: Sequence[Numerics]) -> str | None:
    """A sentence about a set whose codes come from several kinds of device; None for the usual set."""
    devices = sorted({record.device for record in numerics})
    if len(devices) < 2:
        return None
    return (
        f"units were computed on {len(devices)} kinds of device ({'; '.join(devices)}): codes whose margin is below "
        "rounding may differ between them, see asvr verify --recompute"
    )
