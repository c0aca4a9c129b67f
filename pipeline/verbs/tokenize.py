"""The first stage: `asvr tokenize`, `fit-codebook` and `tokenizers`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.verbs.options import AsJson, Overrides, RecipeFile, Submit

app = typer.Typer()


@app.command()
def tokenize(
    recipe: RecipeFile,
    only: Annotated[list[str] | None, typer.Option(metavar="SET", help="this token set only; may be repeated")] = None,
    overrides: Overrides = None,
    replace: Annotated[bool, typer.Option("--replace", help="replace codes of another fingerprint")] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="list the source anew, whatever is remembered of it")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="a trial of about N images that measures rate and size")
    ] = None,
    submit: Submit = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done and why; with --submit, print the command")
    ] = False,
) -> None:
    """Tokenize images that have no codes yet.

    A run resumes where an earlier one stopped, and does nothing when there is nothing to do. What a trial tokenizes
    is kept: the full run goes on from there.
    """
    from pipeline import token_sets

    choice = token_sets.Choice(recipe, tuple(only or ()), tuple(overrides or ()), replace=replace, refresh=refresh)
    if submit:
        from pipeline.submit import tokenize as tokenize_there

        tokenize_there(choice, submit, limit=limit, dry_run=dry_run)
    elif dry_run:
        token_sets.preview_sets(choice)
    elif limit:
        token_sets.try_sets(choice, limit)
    else:
        token_sets.tokenize_sets(choice)


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
def tokenizers(as_json: AsJson = False) -> None:
    """List the tokenizers with shape, origin and licence.

    The kind is what a recipe's `tokenizer: {kind: ...}` says. Figures are those of the published weights; "-" is what
    the recipe or the files decide.
    """
    from pipeline.tokenizer_table import show_tokenizers

    show_tokenizers(as_json=as_json)
