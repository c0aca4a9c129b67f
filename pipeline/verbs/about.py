"""What needs neither a recipe nor a folder: `asvr demo`, `doctor`, `exit-codes` and `version`."""

from __future__ import annotations

import typer

from manifests.errors import EXIT_CODES
from pipeline import console
from pipeline.verbs.options import AsJson

app = typer.Typer()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Run everything on real data, on this CPU."""
    from pipeline.demo.run import main as run_demo

    raise typer.Exit(run_demo(context.args))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has and lacks.

    With the remedy for what either stage lacks. Exits with 9 when something keeps a stage from working. Credentials are
    looked for, never shown.
    """
    from pipeline.doctor import show

    if not show(as_json=as_json):
        raise typer.Exit(9)


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
