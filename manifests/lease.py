"""The lease: one driver at a time may commit to an output folder, and a dead one blocks nobody."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from manifests.atomic import make_folder, storage_errors
from manifests.errors import LeaseHeld
from manifests.redact import command_line

_PATIENCE_S = 0.5  # longer than `lease_owner` holds its shared lock, so that asking for the status refuses no driver
_held_fds: set[int] = set()


@dataclass(frozen=True)
class LeaseOwner:
    """Who holds a lease, as it wrote about itself."""

    host: str
    pid: int
    started: str
    purpose: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.started} ({self.purpose}: {self.command})"


@contextlib.contextmanager
def hold_lease(path: Path, purpose: str) -> Iterator[None]:
    """Hold the exclusive lock on `path`, or raise `LeaseHeld` naming who has it.

    The lock is the kernel's (`flock`): it ends with the process, however that dies. Children that fork without
    exec close their copy of it, or they would keep it after their parent's death.
    """
    with storage_errors("lock", path):
        make_folder(path.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _held_fds.add(fd)
    try:
        with storage_errors("lock", path):
            if not _lock_patiently(fd):
                owner = _read_owner(fd) or "another process"
                raise LeaseHeld(f"{path.parent} is being written by {owner}: wait until it is done, or stop it")
            _write_owner(fd, purpose)
        try:
            yield
        finally:
            if fd in _held_fds:  # not in a forked child
                with contextlib.suppress(OSError):  # a full disk must not hide the error that ended the block
                    os.ftruncate(fd, 0)
    finally:
        if fd in _held_fds:
            _held_fds.discard(fd)
            os.close(fd)


def lease_owner(path: Path) -> LeaseOwner | None:
    """Who holds the lock on `path` now, or None."""
    with storage_errors("read", path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read_owner(fd) or LeaseOwner("an unknown host", 0, "an unknown time", "starting", "")
        else:
            return None
        finally:
            os.close(fd)


def _drop_inherited() -> None:
    for fd in _held_fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held_fds.clear()


os.register_at_fork(after_in_child=_drop_inherited)


def _lock_patiently(fd: int) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while not _lock(fd):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_owner(fd: int, purpose: str) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    owner = LeaseOwner(socket.gethostname(), os.getpid(), started, purpose, " ".join(command_line()))
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(asdict(owner)).encode(), 0)


def _read_owner(fd: int) -> LeaseOwner | None:
    try:
        fields = json.loads(os.pread(fd, 1 << 16, 0))
        return LeaseOwner(**{**fields, "pid": int(fields["pid"])})
    except (ValueError, TypeError, KeyError):
        return None  # just taken and not yet described
