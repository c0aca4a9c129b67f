"""The lease on an object store, where no kernel holds a lock: an object that its owner keeps renewing.

Taking it is: look at `.lease`; if somebody holds it, stop; else write an own token, wait, and read it back. A thread
then renews the object; before each commit the driver reads it again (`check`). Who does not renew it for the time to
live ($ASVR_LEASE_TTL seconds, default 60) has lost it to the next who asks, and so has, at once, a dead process of
the asker's own host. Age is the difference of two times that the store itself gave, of the lease and of an object
written now: no clock of any machine is compared with another's.

Assumed: a read sees the last finished write (S3, GCS and Azure promise it), and the store's clock does not jump.

Not excluded, because Arrow's clients have no write on condition: two drivers hold the lease for a moment, when the
first stalls between its look and its write for longer than the second waits, or when a suspended one wakes between
its check and its commit. A renewal that was suspended after its look is not written. The first check after that stops one of them. What the other may have written by then does
no harm: shards are named by their content, a commit record and a manifest name only whole shards of the same
fingerprint, and the driver that goes on reads the records again at its end.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import TracebackType

from manifests.errors import EnvironmentProblem, LeaseHeld, StorageError
from manifests.lease import LeaseOwner
from manifests.processes import is_dead, this_process
from manifests.redact import command_line
from manifests.storage import LEASE_CLOCK_NAME, Store

TTL_VARIABLE = "ASVR_LEASE_TTL"

_TTL_S = 60.0
_SHORTEST_TTL_S = 3.0  # the store tells time in whole seconds
_RENEWALS_PER_TTL = 6
_SETTLE_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Claim:
    """What the lease object says."""

    token: str
    process: str
    ttl_s: float
    owner: LeaseOwner

    def encode(self, renewal: int) -> bytes:
        """Always as long: who has asked for the size of a shorter object would read the beginning of a longer one."""
        return json.dumps({**asdict(self), "renewal": f"{renewal:010}"}).encode()


class ObjectLease:
    """One attempt to hold the lease object `name` of a store; as a context manager it takes, renews and gives back."""

    def __init__(self, store: Store, name: str, purpose: str) -> None:
        self._store, self._name = store, name
        started = datetime.now(UTC).isoformat(timespec="seconds")
        owner = LeaseOwner(socket.gethostname(), os.getpid(), started, purpose, " ".join(command_line()))
        self._mine = _Claim(secrets.token_hex(16), this_process(), _time_to_live(), owner)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> ObjectLease:
        holder = self.owner()
        if holder is None:
            self._store.write(self._name, self._mine.encode(0))
            time.sleep(_SETTLE_S)
            now = self._read()
            holder = now.owner if now and now.token != self._mine.token else None
        if holder:
            raise LeaseHeld(f"{self._store.location} is being written by {holder}: wait until it is done, or stop it")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._mine.owner.pid:
            return  # a forked child
        self._done.set()
        self._thread.join()
        try:
            if self.holds():
                self._store.write(self._name, b"")
        except StorageError as problem:  # must not hide the error that ended the block
            _log.warning("the lease could not be given back and ends in %.0f s: %s", self._mine.ttl_s, problem)

    def holds(self) -> bool:
        """Whether the lease is this one's; see `check`."""
        now = self._read()
        return now is not None and now.token == self._mine.token

    def check(self) -> None:
        """Raise `LeaseHeld` if the lease is no longer this one's."""
        now = self._read()
        if now is None or now.token != self._mine.token:
            raise LeaseHeld(
                f"{self._store.location} was taken over by {now.owner if now else 'another driver'}, because this "
                f"process did not renew its lease for {self._mine.ttl_s:.0f} s: what it committed before is kept; "
                "run the command again when the other one is done"
            )

    def owner(self) -> LeaseOwner | None:
        """Who holds the lease now. A holder whose renewals cannot be judged, for want of the right to write, counts."""
        claim = self._read()
        if claim is None or is_dead(claim.process):
            return None
        try:
            return None if self._age_s() > claim.ttl_s + 1 else claim.owner
        except StorageError:
            return claim.owner

    def _age_s(self) -> float:
        """Seconds since the lease was renewed, by the store's clock."""
        self._store.write(LEASE_CLOCK_NAME, self._mine.token.encode())
        now, renewed = self._store.stat(LEASE_CLOCK_NAME), self._store.stat(self._name)
        return (now.mtime_ns - renewed.mtime_ns) / 1e9 if now and renewed else 0.0

    def _renew(self) -> None:
        renewal = 0
        while not self._done.wait(self._mine.ttl_s / _RENEWALS_PER_TTL):
            try:
                looked = time.monotonic()
                if not self.holds():
                    return  # the next check says so
                if time.monotonic() - looked > self._mine.ttl_s / 2:
                    continue  # suspended meanwhile: another may hold it by now
                renewal += 1
                self._store.write(self._name, self._mine.encode(renewal))
            except StorageError as problem:
                _log.warning("the lease could not be renewed, trying again: %s", problem)

    def _read(self) -> _Claim | None:
        """The claim in the lease object; None where there is none, or it was given back."""
        if self._store.stat(self._name) is None:
            return None
        try:
            said = json.loads(self._store.read(self._name))
            owner = LeaseOwner(**{**said["owner"], "pid": int(said["owner"]["pid"])})
            return _Claim(str(said["token"]), str(said["process"]), float(said["ttl_s"]), owner)
        except (ValueError, TypeError, KeyError):
            return None


def _time_to_live() -> float:
    text = os.environ.get(TTL_VARIABLE, str(_TTL_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _SHORTEST_TTL_S <= seconds < float("inf"):
        raise EnvironmentProblem(f"{TTL_VARIABLE} is {text!r}: give a number of seconds, {_SHORTEST_TTL_S:.0f} or more")
    return seconds
