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
from typing import IO

from manifests.errors import RankLost

POLL_SECONDS = 0.05
SETTLE_SECONDS = 3.0
"""How long the other ranks may take to end by themselves after one failed, so that the one that knows can say why."""

GRACE_SECONDS = 1800.0
"""How long the ranks of an interrupted run may take for the step they are in and for saving it, before they are killed."""

LEFT_BEHIND_SECONDS = 10.0
"""The same once one of them has ended: the others have saved as well, or wait for it in vain."""

_PR_SET_PDEATHSIG = 1


class RankError(Exception):
    """The rank that ended a run, and its exit code (negative: the signal that killed it; None: the others gave it up)."""

    def __init__(self, rank: int, code: int | None) -> None:
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
    grace = GRACE_SECONDS
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
        grace = LEFT_BEHIND_SECONDS
    finally:
        _stop(ranks, grace)
    if failed is not None:
        raise failed


def run_program(command: Sequence[str], environment: Mapping[str, str], errors: IO[str] | None = None) -> int:
    """Run another launcher, which shares our output streams, to its end; its exit code, negative for a signal.

    What it writes to its standard error goes to the file `errors` where there is one.

    An exception that interrupts the wait is forwarded as SIGTERM; so is our own death, since launchers stop their ranks then.
    """
    process = subprocess.Popen(
        list(command),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stderr=errors,
        process_group=0,
        preexec_fn=_die_with_parent(signal.SIGTERM),
    )
    try:
        return process.wait()
    finally:
        _stop([process], GRACE_SECONDS)


def _watch(ranks: Sequence[subprocess.Popen[bytes]]) -> RankError | None:
    """Wait until all ranks ended well (None) or one failed."""
    while True:
        codes = [process.poll() for process in ranks]
        if any(codes):
            _settle(ranks)
            return _blame(codes, [process.poll() for process in ranks])
        if all(code is not None for code in codes):
            return None
        time.sleep(POLL_SECONDS)


def _settle(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Give the other ranks the time to end by themselves; more of it while none has ended but for the loss of another."""
    began = time.monotonic()
    while None in (codes := [process.poll() for process in ranks]):
        only_lost = not {code for code in codes if code} - {RankLost.exit_code}
        if time.monotonic() - began >= (LEFT_BEHIND_SECONDS if only_lost else SETTLE_SECONDS):
            return
        time.sleep(POLL_SECONDS)


def _blame(first: Sequence[int | None], codes: Sequence[int | None]) -> RankError:
    """The rank that ended the run, by the exit codes when the first had failed and some time later; None still runs.

    One that a signal ended first is why the others fail; then comes one that failed by itself, rank 0 before others because
    all may end with the same error. Where all that ended have lost another rank, it is one that still runs.
    """
    own = [rank for rank, code in enumerate(codes) if code not in (0, None, RankLost.exit_code)]
    killed = [rank for rank in own if (first[rank] or 0) < 0]
    failed = [rank for rank in own if (codes[rank] or 0) > 0]
    hangs = [rank for rank, code in enumerate(codes) if code is None]
    lost = [rank for rank, code in enumerate(codes) if code == RankLost.exit_code]
    rank = next(iter([*killed, *failed, *own, *hangs, *lost]))
    return RankError(rank, codes[rank])


def _stop(ranks: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """End every rank that still runs: SIGTERM, and SIGKILL for what is left after the grace or a second interrupt.

    When one of several ranks is gone, the others have only the short grace left.
    """
    running = [process for process in ranks if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    try:
        deadline = time.monotonic() + grace
        while (left := sum(process.poll() is None for process in running)) and time.monotonic() < deadline:
            if left < len(ranks):
                deadline = min(deadline, time.monotonic() + LEFT_BEHIND_SECONDS)
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


def _die_with_parent(number: int = signal.SIGKILL) -> Callable[[], None] | None:
    """What a child runs before it starts: ask Linux to signal it when its parent dies, however that dies."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return ask
