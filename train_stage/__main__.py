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

from manifests.errors import AsvrError, InputError, RecipeError
from train_stage.checkpoint import is_finished
from train_stage.config import TrainConfig


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train_stage", description=__doc__)
    parser.add_argument("config", type=Path, help="the resolved TrainConfig as JSON, as `asvr train` writes it")
    path: Path = parser.parse_args(arguments).config
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
    return _run(config)


def read_config(path: Path) -> TrainConfig:
    """The configuration in a JSON file; InputError if there is none, RecipeError if it is wrong."""
    try:
        return TrainConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"the run's configuration {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{path} is wrong at {place or 'its top'}: {first['msg']}") from error


def _run(config: TrainConfig) -> int:
    from train_stage.ranks import Stopped
    from train_stage.run import run

    try:
        run(config, _report)
    except AsvrError as error:
        _report(error)
        return error.exit_code
    except Stopped as stopped:
        return stopped.error.exit_code
    return 0


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
