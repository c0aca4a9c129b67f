"""Token sets made of token sets: `asvr manifest merge`, `filter` and `forget`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.verbs.options import IdFile, NewFolder, OutFolder

app = typer.Typer()
verbs = typer.Typer(help="Make token sets of token sets; take images out.", no_args_is_help=True)
app.add_typer(verbs, name="manifest")


@verbs.command()
def merge(inputs: Annotated[list[str], typer.Argument(metavar="OUT...")], output: NewFolder) -> None:
    """Make one token set of several with the same fingerprint."""
    from pipeline.manifest_verbs import merge as merge_all

    merge_all(inputs, output)


@verbs.command("filter")
def filter_(
    out: OutFolder,
    output: NewFolder,
    ids: IdFile = None,
    exclude: Annotated[
        Path | None, typer.Option("--exclude-ids", metavar="FILE", help="leave these image ids out")
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="CONDITION", help='e.g. "width >= 256 and height >= 256"; leaves rejects out')
    ] = None,
) -> None:
    """Make a token set of some images of another one."""
    from pipeline.manifest_verbs import filter_ as filter_set

    filter_set(out, output, ids=ids, exclude=exclude, condition=where)


@verbs.command()
def forget(
    out: OutFolder,
    image_id: Annotated[list[str] | None, typer.Argument(metavar="IMAGE_ID...")] = None,
    ids: IdFile = None,
    purge: Annotated[
        bool, typer.Option("--purge", help="also delete now what older snapshots still hold of them")
    ] = False,
) -> None:
    """Take images out of a token set for good.

    The tokenize job does not take them in again. Without --purge older snapshots still show them, until `asvr gc`.
    """
    from pipeline.manifest_verbs import forget as forget_images

    forget_images(out, image_id or (), ids, purge=purge)
