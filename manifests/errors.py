"""The errors a user can cause, and the exit code each one ends the `asvr` command with.

Each error carries one sentence that says what is wrong, where, and what to do; the command line
prints it without a traceback. Anything else that escapes is a bug and exits with 1.
"""

from __future__ import annotations


class AsvrError(Exception):
    """Base of every error that a user can cause and repair."""

    exit_code = 1


class RecipeError(AsvrError):
    """A recipe or a configuration value is wrong."""

    exit_code = 3


class InputError(AsvrError):
    """A source, checkpoint or other input is missing or unusable."""

    exit_code = 4


class FingerprintMismatch(AsvrError):
    """The output folder holds codes made with other settings."""

    exit_code = 5


class LeaseHeld(AsvrError):
    """Another driver is writing to the same output folder."""

    exit_code = 6


class BudgetExceeded(AsvrError):
    """More inputs failed than the job allows."""

    exit_code = 7


class VerificationFailed(AsvrError):
    """A manifest, or something that it names, is damaged or missing."""

    exit_code = 8


class EnvironmentProblem(AsvrError):
    """A package, a device or a cluster resource that the command needs is not there."""

    exit_code = 9


class StorageError(AsvrError):
    """The storage refused a read or a write: disk full, permission denied, bucket gone."""

    exit_code = 10


class TrainingStopped(AsvrError):
    """Training ended itself: a loss or gradient that is not finite, or a checkpoint that does not fit."""

    exit_code = 11


class TimeLimitReached(AsvrError):
    """Training reached its time limit: it is saved, and the same command goes on."""

    exit_code = 12


class RankLost(AsvrError):
    """A rank of a training run was ended, or did not answer; the same command goes on from the last checkpoint."""

    exit_code = 13


class Interrupted(AsvrError):
    """Ctrl-C or SIGTERM ended the command; what was committed is kept."""

    exit_code = 130

    def __init__(self, message: str, signum: int = 2) -> None:
        super().__init__(message, signum)
        self.message = message
        self.exit_code = 128 + signum

    def __str__(self) -> str:
        return self.message


EXIT_CODES: dict[int, str] = {
    0: "done, or nothing to do",
    1: "a bug in asvr; the traceback is printed",
    2: "wrong command-line usage",
    3: "wrong recipe or configuration",
    4: "an input is missing or unusable",
    5: "the output folder belongs to another fingerprint",
    6: "another driver is writing to the output folder",
    7: "more inputs were rejected than max_reject_rate or max_consecutive_rejects allows",
    8: "verification found problems",
    9: "a package, device or cluster resource is missing",
    10: "the storage refused a read or a write",
    11: "training stopped itself",
    12: "training reached --time-limit; it is saved, and the same command goes on",
    13: "a rank of the training was ended or did not answer; the same command goes on from the last checkpoint",
    130: "interrupted (Ctrl-C); what was committed is kept",
    141: "whoever read the output went away",
    143: "terminated (SIGTERM); what was committed is kept",
}
