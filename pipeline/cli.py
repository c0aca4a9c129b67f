"""The `asvr` command. Every import that costs something stands in the verb that needs it, so that help is instant."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from manifests.errors import EXIT_CODES, AsvrError
from pipeline import console
from pipeline.verbs import about, evaluate, look, manifest, recipe, token_set, tokenize, train, whole

VERBS = (
    recipe,
    whole,
    tokenize,
    train,
    evaluate,
    token_set,
    manifest,
    look,
    about,
)
"""The modules whose commands are the verbs, in the order of the help."""

app = typer.Typer(
    name="asvr",
    help="Tokenize images once, offline; train LLaVA-style models that also predict each image's codes.",
    epilog="Exit codes: asvr exit-codes. Relative paths in a recipe are relative to the recipe file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in VERBS:
    app.add_typer(module.app)


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like an exception, so that leases, temporary files and child processes are let go of."""
    raise SystemExit(128 + signal.SIGTERM)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: see `manifests.errors.EXIT_CODES`.

    An exception that is no AsvrError is a bug and escapes: Python prints its traceback and exits with 1.
    """
    console.set_up_streams()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(arguments, prog_name="asvr")
    except AsvrError as error:
        console.write_error(str(error))
        return error.exit_code
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if code in (130, 143):
            console.write_error(EXIT_CODES[code])
        return code
    except KeyboardInterrupt:
        console.write_error(EXIT_CODES[130])
        return 130
    return 0


def main() -> NoReturn:
    """The console script."""
    code = run()
    if code:
        from tokenize_stage.threads import still_working

        if still_working():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
