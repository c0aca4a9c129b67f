"""The reject budgets: a job whose images are mostly unusable should stop in its first minute, not in its last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from manifests.commits import CommitRecord
from manifests.errors import BudgetExceeded
from manifests.rejects import RejectReason
from tokenize_stage.units import PlannedUnits


@dataclass
class RejectBudget:
    """Rejects of each unit, by reason, against `rate * images`; a unit written again replaces its own count.

    `expected`: images of units still to be done that are known to be missing.
    """

    images: int
    rate: float
    by_unit: dict[str, Counter[str]] = field(default_factory=dict)
    expected: Counter[str] = field(default_factory=Counter)
    example: str = ""

    def count(self, record: CommitRecord) -> None:
        """The rejects of a committed unit."""
        self.by_unit[record.unit] = Counter(row.reason for row in record.rejects)
        del self.expected[record.unit]
        if record.rejects:
            first = record.rejects[0]
            self.example = self.example or f"{first.image_id}: {first.message}"

    def expect_missing(self, unit: str, images: int, example: str) -> None:
        """A unit still to be done of which so many images are known to be missing."""
        self.expected[unit] = images
        self.example = self.example or example

    @property
    def rejected(self) -> int:
        """Rejects so far, over all committed units."""
        return sum(reasons.total() for reasons in self.by_unit.values())

    def check(self) -> None:
        """Raise `BudgetExceeded` as soon as it is certain that the whole set has more rejects than allowed."""
        rejected = self.rejected + self.expected.total()
        if rejected <= self.rate * self.images + 1e-9:
            return
        reasons = sum(self.by_unit.values(), Counter({RejectReason.MISSING.value: self.expected.total()}))
        worst = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(3))
        raise BudgetExceeded(
            f"{rejected} of {self.images} images are rejects ({worst}; for example: {self.example}), more than "
            f"max_reject_rate {self.rate:g} allows: repair them, or raise it and run again to go on from what is committed; "
            "where their storage was away, asvr retry reads them again"
        )


@dataclass(frozen=True)
class Run:
    """Rejects that stand next to each other in the source: its rows `first` to `last`, with their image ids."""

    first: int
    last: int
    first_id: str
    last_id: str

    def __len__(self) -> int:
        return self.last - self.first + 1


@dataclass
class RejectRuns:
    """Rejects in a row, in the order of the source and across units, which come in any order.

    `rows` has for each unit the rows of the inventory that are its members.
    """

    limit: int | None
    rows: Mapping[str, npt.NDArray[np.int64]]
    runs: dict[int, Run] = field(default_factory=dict)
    """Each run under its first and under its last row."""

    @classmethod
    def of_units(cls, limit: int | None, units: PlannedUnits) -> RejectRuns:
        """For the units of a plan."""
        return cls(limit, {cut.name: cut.rows for cut in units.cuts})

    def add(self, record: CommitRecord) -> None:
        """The rejects of a unit that is about to be committed.

        Raises `BudgetExceeded` if they make a run that is too long: then the unit is not to be committed, because
        it is storage that went away rather than so many damaged images.
        """
        if self.limit is None or not record.rejects:
            return
        for run in self._of(record):
            before, after = self.runs.pop(run.first - 1, run), self.runs.pop(run.last + 1, run)
            joined = Run(before.first, after.last, before.first_id, after.last_id)
            self.runs[joined.first] = self.runs[joined.last] = joined
            if len(joined) >= self.limit:
                reason = Counter(row.reason for row in record.rejects).most_common(1)[0][0]
                raise BudgetExceeded(
                    f"{len(joined)} images in a row are rejects (from {joined.first_id} to {joined.last_id}; mostly "
                    f"{reason}), and max_consecutive_rejects is {self.limit}: look whether their storage is there, then "
                    "run again to go on from what is committed, or set max_consecutive_rejects to null"
                )

    def _of(self, record: CommitRecord) -> Iterator[Run]:
        """The runs within a unit."""
        rejected = {row.image_id for row in record.rejects}
        run: Run | None = None
        for row, image_id in zip(self.rows[record.unit].tolist(), record.members.image_id, strict=True):
            if image_id not in rejected:
                continue
            if run and row == run.last + 1:
                run = Run(run.first, row, run.first_id, image_id)
            else:
                if run:
                    yield run
                run = Run(row, row, image_id, image_id)
        if run:
            yield run
