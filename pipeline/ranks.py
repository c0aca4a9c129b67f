"""Start the ranks of a training run on this machine and watch them.

The environment is that of torchrun, so `torchrun` or `deepspeed` may start the same module on several machines. On
one machine it is done here, because torchrun turns every exit code into 1 and every one-sentence error into a page
of traceback; and because ranks must not outlive a killed launcher, or a rerun would write beside them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

POLL_SECONDS = 0.05
SETTLE_SECONDS = 3.0
"""How long the other ranks may take to end by themselves after one failed, so that rank 0 can say why."""

GRACE_SECONDS = 60.0
"""How long a rank may take to end after SIGTERM before it is killed."""

_PR_SET_PDEATHSIG = 1


class RankError(Exception):
    """The rank that ended a run, and its exit code (negative: the signal that killed it)."""

    def __init__(self, rank: int, code: int) -> None:
        super().__init__(f"rank {rank} ended with {code}")
        self.rank, self.code = rank, code


def run_ranks(command: Sequence[str], count: int, environment: Mapping[str, str]) -> None:
    """Run `command` as `count` ranks, which share our output streams, until all are done.

    Raises RankError for the first rank that failed, after the others were stopped. An exception that interrupts the
    wait (KeyboardInterrupt, SystemExit from a signal handler) is forwarded as SIGTERM, and raised once all are gone.
    """
    shared = dict(environment) | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            process = subprocess.Popen(
                list(command),
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C reaches us only, and is forwarded once
                preexec_fn=_die_with_parent(),
            )
            ranks.append(process)
        failed = _watch(ranks)
    finally:
        _stop(ranks)
    if failed is not None:
        raise RankError(failed, ranks[failed].returncode)


def _watch(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all ranks ended well (None) or one failed; rank 0 is preferred among those that fail together."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            deadline = time.monotonic() + SETTLE_SECONDS
            while ranks[0].poll() is None and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            return 0 if (ranks[0].returncode or 0) > 0 else failed[0]
        if all(code is not None for code in codes):
            return None
        time.sleep(POLL_SECONDS)


def _stop(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End every rank that still runs: SIGTERM, and SIGKILL for what is left after the grace or a second interrupt."""
    running = [process for process in ranks if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    try:
        deadline = time.monotonic() + GRACE_SECONDS
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> Callable[[], None] | None:
    """What a child runs before it starts: ask Linux to end it (SIGKILL) when its parent dies, however that dies."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return ask
