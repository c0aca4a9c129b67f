"""`python -m train_stage RUN/config.json`: train what is not trained yet. Under torchrun or alone.

An error that a user can cause ends with one line on stderr, from one rank, and the exit code that
`manifests.errors` lists. Nothing to do: exit code 0, without importing torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from pydantic import ValidationError

from manifests.errors import AsvrError, InputError, RankLost, RecipeError
from train_stage.checkpoint import is_finished
from train_stage.config import TrainConfig
from train_stage.stopping import Stopper

WATCHED = "ASVR_WATCHED"
"""Set in the environment of ranks whose launcher says itself which rank was lost: it knows, and they can only guess."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train_stage", description=__doc__)
    parser.add_argument("config", type=Path, help="the resolved TrainConfig as JSON, as `asvr train` writes it")
    parser.add_argument("--max-steps", type=int, help="make so many steps at most, over all phases")
    parser.add_argument("--time-limit", type=float, help="minutes after which no step is begun")
    given = parser.parse_args(arguments)
    path: Path = given.config
    stopper = Stopper(given.max_steps, given.time_limit)
    first = os.environ.get("RANK", "0") == "0"
    _log_to_stderr(first)
    try:
        config = read_config(path)
        if is_finished(config):
            logging.info("every phase in %s is finished", config.output)
            return 0
    except AsvrError as error:
        if first:
            _report(error)
        return error.exit_code
    return _run(config, stopper)


def read_config(path: Path) -> TrainConfig:
    """The configuration in a JSON file; InputError if there is none, RecipeError if it is wrong."""
    try:
        return TrainConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"the run's configuration {path} cannot be read ({error.strerror}): give the output folder of asvr train"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{path} is wrong at {place or 'its top'}: {first['msg']}") from error


def _run(config: TrainConfig, stopper: Stopper) -> int:
    from train_stage.ranks import Stopped
    from train_stage.run import run

    try:
        stop = run(config, _report, stopper)
    except AsvrError as error:
        if not (isinstance(error, RankLost) and WATCHED in os.environ):
            _report(error)
        return error.exit_code
    except Stopped as stopped:
        return stopped.error.exit_code
    return 0 if stop is None else stop.exit_code


def _report(error: AsvrError) -> None:
    sys.stderr.write(f"error: {error}\n")
    sys.stderr.flush()


def _log_to_stderr(first: bool) -> None:
    """Everything from rank 0, warnings from the others."""
    logging.basicConfig(
        level=logging.INFO if first else logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )


if __name__ == "__main__":
    sys.exit(main())
