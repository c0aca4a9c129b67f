"""The `asvr` command. Every import that costs something stands in the verb that needs it, so that help is instant."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from manifests.errors import EXIT_CODES, AsvrError
from pipeline import console

if TYPE_CHECKING:
    from manifests.report import VerifyReport

app = typer.Typer(
    name="asvr",
    help="Tokenize images once, offline; train LLaVA-style models that also predict each image's codes.",
    epilog="Exit codes: asvr exit-codes. Relative paths in a recipe are relative to the recipe file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="the YAML that describes the run")]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="output folder of a token set, or its manifest.json")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="replace a value, e.g. --set tokenize.vqa.unit_size=128"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


@app.command()
def tokenize(
    recipe: RecipeFile,
    only: Annotated[list[str] | None, typer.Option(metavar="SET", help="this token set only; may be repeated")] = None,
    overrides: Overrides = None,
    replace: Annotated[bool, typer.Option("--replace", help="replace codes of another fingerprint")] = False,
) -> None:
    """Tokenize images that have no codes yet.

    A run resumes where an earlier one stopped, and does nothing when there is nothing to do.
    """
    from pipeline.token_sets import tokenize_sets

    tokenize_sets(recipe, only or (), overrides or (), replace=replace)


@app.command("fit-codebook")
def fit_codebook(
    recipe: RecipeFile,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="this codebook only; may be repeated")] = None,
    overrides: Overrides = None,
) -> None:
    """Learn codebooks from a sample of images."""
    from pipeline.token_sets import fit_codebooks

    fit_codebooks(recipe, only or (), overrides or ())


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    phase: Annotated[str | None, typer.Option(metavar="NAME", help="stop after this phase")] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="processes on this machine; default: one per GPU, else one")
    ] = None,
) -> None:
    """Train the phases that are not finished.

    Goes on from the newest checkpoint. Under torchrun, deepspeed or Slurm each process is one of their ranks.
    """
    from pipeline import launch
    from pipeline.recipe import load_recipe

    raise typer.Exit(launch.train(load_recipe(recipe, overrides or ()).train(), phase=phase, ranks=nproc))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output folder of a training run")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="default: RUN/export")] = None,
) -> None:
    """Write a run as a plain Hugging Face folder."""
    from pipeline import launch

    console.write_line(console.plain(launch.export(run, out)))


@app.command()
def status(out: Output, as_json: AsJson = False) -> None:
    """Show how far a token set is."""
    from manifests.status import status as read_status

    report = read_status(out)
    _show(report, out, as_json, state=report.state)


@app.command()
def verify(
    out: Output,
    as_json: AsJson = False,
    shallow: Annotated[
        bool, typer.Option("--shallow", help="existence and sizes only, without reading shards")
    ] = False,
) -> None:
    """Check a token set byte for byte.

    Exits with 8 when something that the manifest names is missing or damaged.
    """
    from manifests.verify import verify as check
    from pipeline.progress import ProgressLine

    with ProgressLine(str(out), noun="shards") as line:
        report = check(out, deep=not shallow, progress=line.update)
    _show(report, out, as_json)
    if report.problems:
        raise typer.Exit(8)


@app.command()
def tokenizers(as_json: AsJson = False) -> None:
    """List the tokenizers there are, with shape, origin and licence.

    The kind is what a recipe's `tokenizer: {kind: ...}` says. Figures are those of the published weights; "-" is what
    the recipe or the files decide.
    """
    from pipeline.tokenizer_table import show_tokenizers

    show_tokenizers(as_json=as_json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Run everything on real data, on this CPU."""
    from pipeline.demo.run import main as run_demo

    raise typer.Exit(run_demo(context.args))


@app.command("exit-codes")
def exit_codes() -> None:
    """List what each exit code means."""
    for code, meaning in EXIT_CODES.items():
        console.write_line(f"{code:>4}  {meaning}")


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    console.write_line(f"asvr {installed('asvr')}")


def _show(report: VerifyReport, out: Path, as_json: bool, state: str | None = None) -> None:
    """Print a report for a program, or for a person."""
    if as_json:
        console.write_json(report.as_dict())
        return
    rows: list[tuple[str, object]] = [("output", out)]
    if state:
        rows.append(("state", state))
    rows += [(name, getattr(report, name)) for name in ("images", "ok", "rejected", "shards", "fingerprint")]
    rows.append(("problems", len(report.problems)))
    console.write_table([(name, str(f"{value:,}" if isinstance(value, int) else value)) for name, value in rows])
    if report.problems:
        console.write_line()
        console.write_table(
            [(problem.code, problem.path, problem.message) for problem in report.problems], ("code", "path", "message")
        )


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
    sys.exit(code)


if __name__ == "__main__":
    main()
