"""What several verbs take: each argument and option that has one meaning is declared once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from pipeline.launchers import Launcher, Program

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="the YAML that describes the run")]
Output = Annotated[str, typer.Argument(metavar="OUT", help="output folder of a token set, or its manifest.json")]
OutFolder = Annotated[str, typer.Argument(metavar="OUT", help="output folder of a token set")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="replace a value, e.g. --set tokenize.vqa.unit_size=128"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
NewFolder = Annotated[str, typer.Option("--output", "-o", metavar="NEW", help="empty folder for the new token set")]
IdFile = Annotated[
    Path | None,
    typer.Option("--ids", metavar="FILE", help="image ids: text or .jsonl lines, or .parquet column image_id"),
]

LauncherName = Annotated[
    Literal["local", "torchrun", "deepspeed", "slurm"],
    typer.Option("--launcher", help="what starts the training processes"),
]
Nproc = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="training processes on each machine; default: one per GPU, else one"),
]
Nodes = Annotated[int | None, typer.Option(min=1, metavar="N", help="machines, for torchrun and slurm")]
HostFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="machines for deepspeed: a line for each, HOST slots=GPUS")
]
Rendezvous = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="where torchrun's machines meet; the same command on each")
]


def _job_server(address: str | None) -> str | None:
    if address is not None and not address.startswith(("http://", "https://")):
        raise typer.BadParameter("give the address of the job server, such as http://HEAD:8265")
    return address


Submit = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        callback=_job_server,
        help="submit token sets as a job to the Ray cluster at http://HEAD:8265",
    ),
]


def launcher_of(
    program: Program, nproc: int | None, nodes: int | None, hostfile: Path | None, rendezvous: str | None
) -> Launcher:
    """The launcher that the options describe; wrong usage where they do not fit each other."""
    from pipeline.launchers import Launcher

    try:
        return Launcher(program, nproc, nodes, hostfile, rendezvous)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
