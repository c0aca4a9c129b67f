"""What is asked of, or done to, the folder of a token set: `asvr status`, `verify`, `retry`, `gc` and `push`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import console
from pipeline.verbs.options import AsJson, OutFolder, Output

if TYPE_CHECKING:
    from manifests.report import VerifyReport

app = typer.Typer()


@app.command()
def status(out: Output, as_json: AsJson = False) -> None:
    """Show how far a token set is."""
    from manifests.status import status as read_status
    from pipeline.job_line import live_rows

    report = read_status(out)
    _show(report, out, as_json, state=report.state, live=live_rows(report))


@app.command()
def verify(
    out: Output,
    as_json: AsJson = False,
    shallow: Annotated[
        bool, typer.Option("--shallow", help="existence and sizes only, without reading shards")
    ] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="tokenize a random sample again and compare, judged by margin")
    ] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="images that --recompute compares; default: 100")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="S", help="which images --recompute takes; default: 0")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="first restore a lost or damaged manifest")] = False,
    like: Annotated[
        str | None,
        typer.Option(metavar="MANIFEST", help="for --rebuild without snapshots: one of the same fingerprint"),
    ] = None,
) -> None:
    """Check a token set byte for byte.

    Exits with 8 when something that the manifest names is missing or damaged, or codes are not those of the images.
    """
    from pipeline.manifest_verbs import verify as check

    if (sample is not None or seed is not None) and not recompute:
        raise typer.BadParameter("--sample and --seed say what --recompute compares: add it")
    if like is not None and not rebuild:
        raise typer.BadParameter("--like says what --rebuild goes by: add it")
    images = (sample or 100) if recompute else 0
    report = check(out, deep=not shallow, sample=images, seed=seed or 0, rebuild=rebuild, like=like)
    _show(report, out, as_json)
    if report.problems:
        raise typer.Exit(8)


@app.command()
def retry(
    out: OutFolder,
    reason: Annotated[
        list[str] | None, typer.Option(metavar="REASON", help="rejects of this reason only; may be repeated")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="e.g. --set max_pixels=500000000")
    ] = None,
) -> None:
    """Try rejected images again.

    The settings are those that the folder remembers. Ok images are not encoded again; what is new or changed in the
    source is taken in, as in every run.
    """
    from pipeline.manifest_verbs import retry as try_again

    try_again(out, reason or (), overrides or ())


@app.command()
def gc(
    out: OutFolder,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="spare younger files: 90m, 24h, 7d")] = "24h",
    keep_snapshots: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="of the older manifests keep only the newest N; default: all")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove files that nothing in the token set names.

    What names files: the manifest, its older snapshots, and the records of commits.
    """
    from pipeline.manifest_verbs import gc as collect

    collect(out, older_than=older_than, keep_snapshots=keep_snapshots, dry_run=dry_run, as_json=as_json)


@app.command()
def push(
    out: OutFolder,
    to: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="data set on the Hugging Face Hub; made if it is not there")
    ],
    private: Annotated[bool, typer.Option("--private", help="a new data set is not public")] = False,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="of the codes, as the Hub writes it; default: other")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="replace a set of another fingerprint")] = False,
) -> None:
    """Publish a token set on the Hugging Face Hub.

    The set has to be finished, and gets a card. Goes on where an interrupted push stopped. A phase trains on it with
    `manifests: [hf://datasets/OWNER/NAME]`.
    """
    from pipeline.publish import push as publish

    console.write_line(
        console.plain(f"published as {publish(out, to, private=private, licence=licence, replace=replace)}")
    )


def _show(
    report: VerifyReport,
    out: str,
    as_json: bool,
    state: str | None = None,
    live: Sequence[tuple[str, object]] = (),
) -> None:
    """Print a report for a program, or for a person."""
    if as_json:
        console.write_json(report.as_dict())
        return
    rows: list[tuple[str, object]] = [("output", out)]
    if state:
        rows.append(("state", state))
    rows += live
    rows += [(name, getattr(report, name)) for name in ("images", "ok", "rejected", "shards", "fingerprint")]
    rows.append(("problems", len(report.problems)))
    console.write_table([(name, str(f"{value:,}" if isinstance(value, int) else value)) for name, value in rows])
    if report.problems:
        console.write_line()
        console.write_table(
            [(problem.code, problem.path, problem.message) for problem in report.problems], ("code", "path", "message")
        )
    for note in report.notes:
        console.write_line(console.plain(f"note: {note}"))
