"""The processes of a training run: who am I, what do we add up to, and what do we do when one of us cannot go on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from manifests.errors import AsvrError, RankLost

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The ranks stop together because of an AsvrError of one of them; only the rank that `speaks` reports it."""

    def __init__(self, error: AsvrError, speaks: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.speaks = speaks


@dataclass(frozen=True)
class Ranks:
    """This process among `world` equal ones, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64 so that counts stay exact."""
        if self.world == 1:  # also of a process that has joined nobody, as in evaluation
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def most(self, value: float) -> float:
        """The largest of the ranks' values. Collective."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor.item())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum([0.0])

    def gather(self, items: list[str]) -> list[str]:
        """The items of all ranks, by rank. Collective."""
        found: list[list[str]] = [[]] * self.world
        dist.all_gather_object(found, items)
        return [item for own in found for item in own]

    def from_first(self, value: int) -> int:
        """Rank 0's value, on every rank. Collective."""
        return int(self.sum([value if self.rank == 0 else 0])[0])

    def share_error(self, error: AsvrError | None) -> None:
        """Raise on every rank if any rank brings an error: that of the lowest such rank. Collective.

        One process alone raises its error as it is; several raise `Stopped`.
        """
        if self.world == 1:
            if error is not None:
                raise error
            return
        found: list[AsvrError | None] = [None] * self.world
        dist.all_gather_object(found, error)
        for rank, other in enumerate(found):
            if other is not None:
                raise Stopped(other, speaks=rank == self.rank) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every rank; if it raises AsvrError on one of them, all of them stop. Collective."""
        failure: AsvrError | None = None
        try:
            yield
        except AsvrError as error:
            failure = error
        self.share_error(failure)


def has_gpu() -> bool:
    """Whether to compute on GPUs: where there are any, unless DeepSpeed is told not to (DS_ACCELERATOR=cpu)."""
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def join_ranks(timeout_seconds: int) -> Ranks:
    """Join the process group that `torchrun` or another launcher describes in the environment; alone without one."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = has_gpu()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    # DeepSpeed makes groups of its own, which have torch's default (30 minutes, on GPUs 10) unless that is ours.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    backend = "nccl" if cuda else "gloo"
    if world == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    return Ranks(rank, world, device)


def leave_ranks() -> None:
    """End the process group; safe to call when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def lost_ranks_named(timeout_seconds: int, output: str) -> Iterator[None]:
    """RankLost for what torch raises in a block when another rank is gone or silent; all else goes through as it is."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        log.debug("what torch says", exc_info=True)
        late = "timed out" in str(error).lower()
        raise RankLost(
            f"rank {os.environ.get('RANK', '0')} "
            + (f"waited {timeout_seconds} s (timeout_seconds) for" if late else "lost its connection to")
            + " another rank, which hangs or was ended: see what that one or its machine says; the same command resumes "
            f"from {output}"
        ) from error


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether torch raised it because another rank cannot be reached: gone, or silent for longer than the timeout."""
    text = str(error)
    if isinstance(error, dist.DistBackendError):
        return "ncclRemoteError" in text or "collective operation timeout" in text
    # gloo has no class of its own; a check that fails in it is a mistake in our calls.
    lost = "gloo/transport" in text and "enforce fail" not in text
    return lost or isinstance(error, dist.DistNetworkError | dist.DistStoreError)
