"""The reject budget: a job whose images are mostly unusable should stop in its first minute, not in its last."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from manifests.commits import CommitRecord
from manifests.errors import BudgetExceeded
from manifests.rejects import RejectReason


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
            f"max_reject_rate {self.rate:g} allows: repair them, or raise it and run again to go on from what is committed"
        )
