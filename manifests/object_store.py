"""A store in an object store. A write is one upload, which the store shows whole or not at all."""

from __future__ import annotations

import builtins
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa

from manifests.atomic import pieces
from manifests.errors import StorageError
from manifests.lease import LeaseOwner
from manifests.object_lease import ObjectLease
from manifests.parallel import ordered_map
from manifests.remote import PATHLESS, Remote, open_remote
from manifests.remote_errors import client_errors, is_storage_fault, no_bucket, sentence
from manifests.storage import LEASE_NAME, FileStat, Store

THREADS = 32
"""Small files read at once by `read_many`: the wait for each is a round trip."""

_APPEND_EVERY_S = 15.0
_MANY = 4
_log = logging.getLogger(__name__)


class ObjectStore(Store):
    """The objects whose keys start with one prefix. Pickles as its URL."""

    is_local = False

    def __init__(self, url: str) -> None:
        self._remote: Remote = open_remote(url)
        self.location = self._remote.url
        self._lease: ObjectLease | None = None
        self._logs: dict[str, bytearray] = {}
        self._logs_written = time.monotonic()

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.location,)

    def where(self, rel: str) -> str:
        return f"{self.location}/{self.inside(rel)}"

    def exists(self, rel: str) -> bool:
        with self._errors("read", rel):
            found = self._remote.files.exists(self._key(rel))
        if not found:
            self._refuse_missing_bucket("read", self.where(rel))
        return found

    def stat(self, rel: str) -> FileStat | None:
        with self._errors("read", rel):
            found = self._remote.files.stat(self._key(rel))
        if found is None:
            self._refuse_missing_bucket("read", self.where(rel))
        return found

    def sizes(self, rels: Sequence[str]) -> builtins.list[int | None]:
        if len(rels) <= _MANY:
            return [self.size_if_there(rel) for rel in rels]
        names = [self.inside(rel) for rel in rels]
        found: dict[str, int] = {}
        for folder in {name.rpartition("/")[0] for name in names}:
            found |= {rel: size for rel, (size, _) in self.walk(f"{folder}/" if folder else "")}
        return [found.get(name) for name in names]

    def read(self, rel: str) -> bytes:
        with self._errors("read", rel):
            return self._read_whole(self._key(rel))

    def _read_whole(self, key: str) -> bytes:
        with self._remote.files.open(key) as file:
            size = file.size()
            try:
                return bytes(file.read())
            except OSError as error:
                found = self._remote.files.stat(key)
                if found is None:  # gone since it was opened, which the client says in many ways
                    raise FileNotFoundError(str(error)) from error
                if found.size == size:
                    raise
        # Between the requests for its size and for its bytes another took its place: a lease that was given back.
        return self._read_whole(key)

    def read_range(self, rel: str, offset: int, length: int) -> bytes:
        with self._errors("read", rel), self._remote.files.open(self._key(rel)) as file:
            file.seek(min(offset, file.size()))
            return bytes(file.read(length))

    def read_many(self, rels: Iterable[str]) -> Iterator[bytes]:
        return ordered_map(self.read, rels, threads=THREADS)

    def open_input(self, rel: str) -> pa.NativeFile:
        with self._errors("read", rel):
            return self._remote.files.open(self._key(rel))

    def fault(self, rel: str, error: Exception) -> StorageError | None:
        return sentence("read", self.where(rel), error) if is_storage_fault(error) else None

    def walk(self, prefix: str = "", pathless: builtins.list[str] | None = None) -> Iterator[tuple[str, FileStat]]:
        base = prefix.rpartition("/")[0].strip("/")
        start = f"{self._remote.root}/"
        where = f"{self.location}/{prefix}"
        empty = True
        with client_errors("list", where, self._remote.bucket_is_gone):
            for key, found in self._remote.files.find(self._key(base) if base else self._remote.root):
                empty = False
                rel = key.removeprefix(start)
                if not rel.startswith(prefix):
                    continue
                if not PATHLESS & set(rel.split("/")):
                    yield rel, found
                elif pathless is not None:
                    pathless.append(f"{self.location}/{rel}")
        if empty:
            self._refuse_missing_bucket("list", where)

    def write(self, rel: str, data: bytes | memoryview | BinaryIO) -> None:
        with self._errors("write", rel):
            self._remote.files.put(self._key(rel), pieces(data))

    def append(self, rel: str, data: bytes) -> None:
        """Add to a log. While a lease is held the log is uploaded now and then, and when the lease ends."""
        if rel not in self._logs:
            self._logs[rel] = bytearray(self.read(rel) if self.stat(rel) else b"")
        self._logs[rel] += data
        if self._lease is None or time.monotonic() - self._logs_written > _APPEND_EVERY_S:
            self._write_logs()

    def delete(self, rel: str) -> None:
        with self._errors("delete", rel), contextlib.suppress(FileNotFoundError):
            self._remote.files.remove(self._key(rel))

    @contextlib.contextmanager
    def lease(self, purpose: str) -> Iterator[None]:
        lease = ObjectLease(self, LEASE_NAME, purpose)
        with lease:
            self._lease = lease
            try:
                yield
            finally:
                self._lease = None
                self._end_logs(lease)

    def check_lease(self) -> None:
        if self._lease is None:
            raise RuntimeError(f"nobody holds the lease of {self.location} through this store")
        self._lease.check()

    def lease_owner(self) -> LeaseOwner | None:
        return ObjectLease(self, LEASE_NAME, "").owner()

    def _end_logs(self, lease: ObjectLease) -> None:
        """Upload the logs a last time, unless another driver writes them now; must not hide what ended the block."""
        try:
            if self._logs and lease.holds():
                self._write_logs()
        except StorageError as problem:
            _log.warning("the last lines of %s are lost: %s", ", ".join(self._logs), problem)
        self._logs.clear()

    def _write_logs(self) -> None:
        """Upload the logs. Without a lease the copies in memory go, so that they do not hide what others write."""
        for rel, content in self._logs.items():
            self.write(rel, bytes(content))
        self._logs_written = time.monotonic()
        if self._lease is None:
            self._logs.clear()

    def _refuse_missing_bucket(self, action: str, where: str) -> None:
        """Clients show a missing bucket as an empty one, which a job would take for a set nobody has begun."""
        if self._remote.bucket_is_gone():
            raise no_bucket(action, where, "the store knows none of that name")

    def _key(self, rel: str) -> str:
        return f"{self._remote.root}/{self.inside(rel)}"

    def _errors(self, action: str, rel: str) -> client_errors:
        return client_errors(action, self.where(rel), self._remote.bucket_is_gone)
