"""The recipe itself: `asvr init` writes one, `asvr schema` describes it to an editor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline import console

app = typer.Typer()


@app.command()
def init(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="a folder or file: LLaVA records, tars, Parquet, pictures")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="the new recipe")] = Path(
        "recipe.yaml"
    ),
    encoder: Annotated[
        str, typer.Option(metavar="ENCODER", help="folder or hub id of the vision encoder")
    ] = "google/siglip-so400m-patch14-384",
    language_model: Annotated[
        str, typer.Option(metavar="MODEL", help="folder or hub id of the language model")
    ] = "lmsys/vicuna-7b-v1.5",
) -> None:
    """Write a commented recipe for the data at hand.

    An existing file is never overwritten.
    """
    from shlex import quote

    from pipeline.starter import write_recipe

    found = write_recipe(data, output, encoder=encoder, language_model=language_model)
    console.write_line(
        console.plain(f"{output}: a recipe for {found.why}; read it, then asvr plan {quote(str(output))}")
    )


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from pipeline.recipe_schema import recipe_schema

    console.write_json(recipe_schema())
