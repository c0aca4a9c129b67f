"""Looking at results: `asvr report` and `asvr inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline import console
from pipeline.verbs.options import AsJson

app = typer.Typer()


@app.command()
def report(
    target: Annotated[str, typer.Argument(metavar="OUT|RUN", help="output folder of a token set or a training run")],
    other: Annotated[str | None, typer.Option("--with", metavar="RUN", help="a second run to put beside it")] = None,
    images: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="images to show of a token set")] = 200,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="default: report.html in the folder")] = None,
) -> None:
    """Write one HTML page of pictures, codes and curves.

    Of a token set pictures beside their codes, of a RUN its curves and answers, and the token sets that it learned from.
    The page needs no network and no other file.
    """
    from pipeline.progress import ProgressLine
    from pipeline.report.build import write_report

    with ProgressLine(target) as line:
        place = write_report(target, images=images, other=other, to=to, progress=line.update)
    console.write_line(console.plain(place))


@app.command()
def inspect(
    image: Annotated[str, typer.Argument(metavar="IMAGE_ID|FILE", help="an image of the set, or a copy of its file")],
    out: Annotated[str, typer.Option("--in", metavar="OUT", help="output folder of a token set, or its manifest.json")],
    as_json: AsJson = False,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="also draw views and code maps into this file")
    ] = None,
) -> None:
    """Show the codes of one image, and where they stand.

    A terminal with colours gets code maps, everything else the numbers.
    """
    from pipeline.report.inspect import inspect_image

    inspect_image(image, out, as_json=as_json, png=png)
