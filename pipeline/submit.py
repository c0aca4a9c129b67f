"""`asvr tokenize --submit ADDRESS`: hand the job to a Ray cluster's job server, by the program `ray job submit`.

The job is the same command, on a machine of the cluster. Nothing is sent along: the recipe, like everything it names, lies
where every node has it, because relative paths would mean something else in an uploaded copy.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import signal
import subprocess
import tempfile

from manifests.errors import EXIT_CODES, EnvironmentProblem, Interrupted, RecipeError
from pipeline.console import plain, write_line
from pipeline.launchers import find_program
from pipeline.ranks import run_program
from pipeline.token_sets import Choice

_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Ray would submit to the cluster that these name, whatever its --address says."""

_EXIT_CODE = re.compile(r"Status message: Job entrypoint command failed with exit code (\d+)")
"""What `ray job status` says of a job that failed; the end of the job's log comes after it."""

_ERROR = re.compile(r"^[\w.]*Error: (.+)$", re.MULTILINE)
"""The line of a traceback, or of wrong usage, that says what was wrong."""


class JobFailed(EnvironmentProblem):
    """A submitted job ended with an error, which stands in its log. Its exit code is ours where it is one of `asvr`."""

    def __init__(self, message: str, code: int | None) -> None:
        super().__init__(message)
        if code in EXIT_CODES:
            self.exit_code = code


def tokenize(choice: Choice, address: str, *, limit: int | None = None, dry_run: bool = False) -> None:
    """Submit the token sets of `choice` and wait, its log on our output; with `dry_run` print the command.

    Raises RecipeError for a set that would not use the cluster, EnvironmentProblem when there is no `ray` here, or the job
    could not be submitted, JobFailed when it failed, and Interrupted when somebody stopped it.
    """
    for name, config in choice.sets().items():
        if config.engine != "ray" or config.ray.address != "auto":
            raise RecipeError(
                f"token set {name} would not use the cluster that it is submitted to: set its engine to ray and "
                "ray.address to auto, or leave out --submit"
            )
    command = ["--address", address, "--", "asvr", *_arguments(choice, limit)]
    if dry_run:
        without = [part for name in _OVERRIDES if name in os.environ for part in ("-u", name)]
        write_line(plain(shlex.join([*(["env", *without] if without else []), "ray", "job", "submit", *command])))
        return
    _run(address, command)


def _run(address: str, command: list[str]) -> None:
    ray, job = find_program("ray", os.environ), f"asvr-{secrets.token_hex(8)}"
    environment = {name: value for name, value in os.environ.items() if name not in _OVERRIDES}
    with tempfile.TemporaryFile("w+") as told:  # the log of the job is not in it
        code = run_program([ray, "job", "submit", "--submission-id", job, *command], environment, told)
        told.seek(0)
        reasons = _ERROR.findall(told.read())
    if code and reasons:
        raise EnvironmentProblem(
            f"the job server at {address} did not take the job, or was lost ({reasons[-1][:200]}): correct --submit; if it "
            "asks for a token, set RAY_AUTH_MODE=token"
        )
    status = [ray, "job", "status", "--address", address, job]
    found = subprocess.run(status, env=environment, capture_output=True, text=True, check=False)
    if code:
        own = _EXIT_CODE.search(found.stdout)
        raise JobFailed(
            f"the job on {address} failed, and what it said stands above; what is committed is kept, and the same command "
            "goes on",
            int(own[1]) if own else None,
        )
    if found.returncode:
        raise EnvironmentProblem(
            f"the job server at {address} no longer says how job {job} ended: ask it, or run the same command again"
        )
    if f"'{job}' succeeded" not in found.stdout:  # `ray job submit` ends with 0 for a job that was stopped
        raise Interrupted(
            f"the job on {address} was stopped; what is committed is kept, and the same command goes on", signal.SIGTERM
        )


def _arguments(choice: Choice, limit: int | None) -> list[str]:
    return [
        "tokenize",
        str(choice.recipe.absolute()),
        *(part for name in choice.only for part in ("--only", name)),
        *(part for override in choice.overrides for part in ("--set", override)),
        *(["--replace"] if choice.replace else []),
        *(["--refresh"] if choice.refresh else []),
        *(["--limit", str(limit)] if limit else []),
    ]
