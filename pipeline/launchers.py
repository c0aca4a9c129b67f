"""How the ranks of a training run are started by other programs: the exact command of torchrun, DeepSpeed or Slurm.

Each of them starts `asvr train RECIPE` once a rank, which sees by RANK and WORLD_SIZE that it is one of theirs.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manifests.errors import EnvironmentProblem

Program = Literal["local", "torchrun", "deepspeed", "slurm"]

FIRST_PORT = 20_000
"""Of the ports that Slurm jobs meet at: this one and the 20,000 after it, by the number of the job."""

_SLURM_RANK = (
    'export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE={nproc} '
    f'MASTER_PORT="$(({FIRST_PORT} + SLURM_JOB_ID % 20000))" '
    'MASTER_ADDR="$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)"; exec "$@"'
)
"""What turns Slurm's variables of a task into those of a rank: all ranks meet on the first node of the step."""

_INSTALL = {
    "torchrun": "pip install 'asvr[train]'",
    "deepspeed": "pip install 'asvr[train]'",
    "ray": "pip install 'asvr[tokenize]' 'ray[default]'",
    "srun": "run this where Slurm's commands are",
}


@dataclass(frozen=True)
class Launcher:
    """Which program starts the ranks, and where. `nproc`: ranks on each machine, default one per GPU, else one.

    `local`: asvr itself, on this machine. `torchrun`: this machine or, with `nodes` and `rendezvous` (HOST:PORT) and the
    same command on each, several. `deepspeed`: this machine, or those of `hostfile` over ssh. `slurm`: `nodes` of Slurm's.
    Raises ValueError, one sentence, for a combination that means nothing.
    """

    program: Program = "local"
    nproc: int | None = None
    nodes: int | None = None
    hostfile: Path | None = None
    rendezvous: str | None = None

    def __post_init__(self) -> None:
        if self.hostfile is not None and self.program != "deepspeed":
            raise ValueError("--hostfile is for --launcher deepspeed")
        if self.nodes is not None and self.program not in ("torchrun", "slurm"):
            raise ValueError("--nodes is for --launcher torchrun or slurm; a hostfile lists the machines of deepspeed")
        if self.rendezvous is not None and self.program != "torchrun":
            raise ValueError("--rendezvous is for --launcher torchrun")
        if self.program == "torchrun" and (self.nodes or 1) > 1 and self.rendezvous is None:
            raise ValueError("torchrun on several machines needs --rendezvous HOST:PORT, the same on each of them")
        if self.program == "slurm" and self.nproc is None:
            raise ValueError("--launcher slurm needs --nproc, the ranks of each node: as many as it has GPUs")

    def command(self, asvr: Sequence[str], *, gpus: int, environment: Mapping[str, str]) -> list[str]:
        """The command that starts `asvr ARGUMENTS` as every rank. `gpus`: those of this machine.

        Raises EnvironmentProblem when this machine has fewer GPUs than ranks.
        """
        if self.program == "torchrun":
            return ["torchrun", *self._torchrun(gpus), "-m", "pipeline", *asvr]
        if self.program == "deepspeed":
            return ["deepspeed", *self._deepspeed(gpus), "--module", "pipeline", *asvr]
        on_cpu = environment.get("DS_ACCELERATOR") == "cpu"
        return ["srun", *self._srun(on_cpu), sys.executable, "-m", "pipeline", *asvr]

    def lines(self, asvr: Sequence[str], *, gpus: int, environment: Mapping[str, str]) -> list[str]:
        """The same as lines for a shell: one, or of `local` one for each rank, to be run side by side."""
        if self.program != "local":
            return [shlex.join(self.command(asvr, gpus=gpus, environment=environment))]
        count = self.ranks_here(gpus)
        command = shlex.join([sys.executable, "-m", "pipeline", *asvr])
        return [
            f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE={count} LOCAL_WORLD_SIZE={count} MASTER_ADDR=127.0.0.1 "
            f"MASTER_PORT={FIRST_PORT} {command}"
            for rank in range(count)
        ]

    def ranks_here(self, gpus: int) -> int:
        """Ranks on this machine."""
        if self.nproc and gpus and self.nproc > gpus:
            raise EnvironmentProblem(
                f"--nproc {self.nproc} is more than the {gpus} GPU(s) of this machine; give at most {gpus}"
            )
        return self.nproc or max(gpus, 1)

    def _torchrun(self, gpus: int) -> list[str]:
        ranks = f"--nproc-per-node={self.ranks_here(gpus)}"
        if self.rendezvous is None:
            return ["--standalone", ranks]
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.rendezvous}", "--rdzv-id=asvr"]
        return [f"--nnodes={self.nodes or 1}", ranks, *meeting]

    def _deepspeed(self, gpus: int) -> list[str]:
        if self.hostfile is None:
            return [f"--num_gpus={self.ranks_here(gpus)}", "--no_local_rank"]
        slots = [f"--num_gpus={self.nproc}"] if self.nproc else []
        return [f"--hostfile={self.hostfile.absolute()}", *slots, "--no_local_rank"]

    def _srun(self, on_cpu: bool) -> list[str]:
        gpus = [] if on_cpu else [f"--gpus-per-node={self.nproc}"]
        shape = [f"--nodes={self.nodes or 1}", f"--ntasks-per-node={self.nproc}", *gpus, "--kill-on-bad-exit=1"]
        return [*shape, "sh", "-c", _SLURM_RANK.format(nproc=self.nproc), "asvr"]


def find_program(program: str, environment: Mapping[str, str]) -> str:
    """The place of a program; EnvironmentProblem when it is not installed."""
    found = shutil.which(program, path=environment.get("PATH"))
    if found is None:
        raise EnvironmentProblem(f"the program {program} is not here: {_INSTALL[program]}")
    return found
