"""`asvr eval`: what a trained model is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import plain, write_json, write_line, write_table
from pipeline.verbs.options import AsJson

app = typer.Typer()


@app.command("eval")
def evaluate(
    where: Annotated[Path, typer.Argument(metavar="RUN|EXPORT", help="output folder of a run, or an exported model")],
    data: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="held-out records; default: the phase's validation data")
    ] = None,
    image_root: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="image root of each --data, in order")
    ] = None,
    manifest: Annotated[
        list[str] | None, typer.Option(metavar="OUT", help="token set of the held-out images; default: the phase's")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="ask the first N questions only")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="default: RUN/eval, or eval beside the export")
    ] = None,
    as_json: AsJson = False,
    lmms_eval: Annotated[
        bool, typer.Option("--lmms-eval", help="only print the command that runs the paper's 14 benchmarks on EXPORT")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, metavar="N", help="of that command: one per GPU")] = 1,
) -> None:
    """Measure held-out losses, codes found and answers.

    A run gives losses and answers, an export answers alone. Everything said is kept in DIR/answers.jsonl.
    """
    if lmms_eval:
        from pipeline.lmms_eval import command

        write_line(command(where, out or where.resolve().parent / "lmms_eval", processes=processes))
        return
    from pipeline import evaluation

    if len(data or ()) != len(image_root or ()):
        raise typer.BadParameter("give an --image-root for each --data")
    asked = evaluation.Asked(tuple(zip(data or (), image_root or (), strict=True)), tuple(manifest or ()), limit)
    found = evaluation.evaluate(where, asked, out)
    if as_json:
        write_json(found)
        return
    losses = found.get("losses", {})
    rows: list[tuple[str, object]] = [(name, found[name]) for name in ("phase", "step", "export") if name in found]
    rows += [
        (name, f"{losses[name]:.4f}") for name in ("loss", "text_loss", "visual_loss") if losses.get(name) is not None
    ]
    for name, term in losses.get("objectives", {}).items():
        rows.append((f"{name}: loss by depth", " ".join(f"{value:.4f}" for value in term["loss_depth"])))
        if term["accuracy_depth"]:
            rows.append((f"{name}: codes found by depth", " ".join(f"{value:.3f}" for value in term["accuracy_depth"])))
    rows.append(("questions", f"{found['questions']:,}"))
    if found["accuracy"] is not None:
        rows.append(("answered exactly", f"{found['accuracy']:.4f}"))
    if found["records_not_asked"]:
        rows.append(("records without a question", f"{found['records_not_asked']:,}"))
    write_table([(name, plain(value)) for name, value in rows])
