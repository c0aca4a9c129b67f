"""A reject: an image that cannot be used, with its reason. An outcome of one image, not an error of the job.

A reject is decided by the bytes and the reference of one image, so the same input is always the same reject.
Failures of the machine (an I/O error, no memory, CUDA) are never rejects.
"""

from __future__ import annotations

from enum import StrEnum


class RejectReason(StrEnum):
    """Why an image cannot be used; the words that stand in the rejects table."""

    MISSING = "missing"
    UNREADABLE = "unreadable"
    OUTSIDE_ROOT = "outside_root"
    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_MANY_PIXELS = "too_many_pixels"
    UNSUPPORTED = "unsupported"


class Reject(Exception):  # an outcome, not an error
    """One image that cannot be used: a reason class and one sentence for people.

    Of a name that is not UTF-8 the sentence has the bytes as `\\udcXX`, so that it can be stored wherever text can.
    It pickles, so that it crosses a process border, and compares by value.
    """

    def __init__(self, reason: RejectReason, message: str) -> None:
        self.reason = RejectReason(reason)
        self.message = message.encode(errors="backslashreplace").decode()
        super().__init__(self.reason, self.message)

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reject) and (self.reason, self.message) == (other.reason, other.message)

    def __hash__(self) -> int:
        return hash((self.reason, self.message))
