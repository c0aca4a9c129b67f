"""Where a token set or a source is kept: a folder, on a disk or in an object store, addressed by relative POSIX paths.

`Store.open` takes a path or a URL and gives one of the two implementations; nobody else needs to know which.
Credentials and endpoints come from the environment alone (see `manifests.remote`).
"""

from __future__ import annotations

import builtins
import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit

from manifests.atomic import TEMPORARY_PREFIX, make_folder, storage_errors
from manifests.errors import InputError, StorageError
from manifests.hashes import cache_dir, file_sha256
from manifests.lease import LeaseOwner

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "LEASE_CLOCK_NAME",
    "LEASE_FILES",
    "LEASE_NAME",
    "TEMPORARY_PREFIX",
    "FileStat",
    "LeaseOwner",
    "Store",
    "cache_dir",
    "file_sha256",
    "is_url",
]

LEASE_NAME = ".lease"
LEASE_CLOCK_NAME = ".lease-clock"
LEASE_FILES = frozenset({LEASE_NAME, LEASE_CLOCK_NAME})
"""What a lease leaves in a folder that is otherwise empty."""


class FileStat(NamedTuple):
    """What tells a changed file from an unchanged one. Object stores tell time in whole seconds."""

    size: int
    mtime_ns: int


class Store(ABC):
    """A folder addressed by relative POSIX paths (`rel`).

    Its methods raise `StorageError`, one sentence, when the storage refuses or stays unreachable, and `InputError` for
    a path that leaves the folder. Object stores have had their own retries by then.
    """

    is_local: bool
    location: str
    """The absolute path of the folder, or its URL."""
    piece = 64 << 20
    """Bytes that are asked for at once where a file is not held: each request to a network takes its time."""

    @staticmethod
    def open(location: str | Path) -> Store:
        """A store at a path or URL; it need not exist yet, the first write makes it.

        `StorageError` for a URL that nothing here can read, `EnvironmentProblem` where its package is not installed.
        """
        text = str(location)
        if is_url(text) and not text.startswith("file://"):
            from manifests.object_store import ObjectStore  # not at the top: it imports the clients

            return ObjectStore(text)
        from manifests.local_store import LocalStore

        return LocalStore(_local_path(text))

    @abstractmethod
    def where(self, rel: str) -> str:
        """`rel` for messages and provenance: an absolute path or a URL."""

    @abstractmethod
    def exists(self, rel: str) -> bool:
        """Whether `rel` is a file or folder of the store."""

    @abstractmethod
    def stat(self, rel: str) -> FileStat | None:
        """Size and time of the file `rel`, or None where no file is."""

    def size_if_there(self, rel: str) -> int | None:
        """The size of the file `rel` in bytes, or None where none is."""
        found = self.stat(rel)
        return None if found is None else found.size

    def size(self, rel: str) -> int:
        """The size of the file `rel` in bytes."""
        found = self.size_if_there(rel)
        if found is None:
            raise StorageError(f"cannot read {self.where(rel)}: no such file; check that the path is right")
        return found

    @abstractmethod
    def sizes(self, rels: Sequence[str]) -> builtins.list[int | None]:
        """`size_if_there` of many files, at the price of a listing rather than a question for each."""

    @abstractmethod
    def read(self, rel: str) -> bytes:
        """The content of `rel`."""

    @abstractmethod
    def read_range(self, rel: str, offset: int, length: int) -> bytes:
        """`length` bytes of `rel` from `offset`; fewer where the file ends."""

    @abstractmethod
    def read_many(self, rels: Iterable[str]) -> Iterator[bytes]:
        """The contents of many small files, in order; a bounded number of them is held at a time."""

    @abstractmethod
    def open_input(self, rel: str) -> pa.NativeFile:
        """`rel` as a seekable file, to be closed by the caller. Its own methods raise `OSError`: see `fault`."""

    @abstractmethod
    def fault(self, rel: str, error: Exception) -> StorageError | None:
        """The `StorageError` that an error of a file from `open_input` means; None if it says that the file is bad."""

    @abstractmethod
    def walk(self, prefix: str = "", pathless: builtins.list[str] | None = None) -> Iterator[tuple[str, FileStat]]:
        """All files whose relative path starts with `prefix`, in any order, each once; temporary files are left out.

        So are objects whose keys are no paths, having an empty, `.` or `..` part (`a//b`): no method of a store finds
        them. Their URLs are added to `pathless`.
        """

    def list(self, prefix: str = "") -> builtins.list[str]:
        """The relative paths of the files that start with `prefix`, sorted; temporary files are left out."""
        return sorted(rel for rel, _ in self.walk(prefix))

    def sha256(self, rel: str, size: int) -> str:
        """The sha256 of the first `size` bytes of `rel`, which are read by pieces."""
        hashed = hashlib.sha256()
        for offset in range(0, size, self.piece):
            hashed.update(self.read_range(rel, offset, min(self.piece, size - offset)))
        return hashed.hexdigest()

    @abstractmethod
    def write(self, rel: str, data: bytes | memoryview | BinaryIO) -> None:
        """Put `data`, or what an open file holds, at `rel`: a reader, or a crash at any moment, sees the old content
        or the new.
        """

    @contextmanager
    def scratch(self) -> Iterator[BinaryIO]:
        """A file without a name for what is too large to be held: on the disk of the folder, or on one of this machine."""
        folder = Path(self.location if self.is_local else tempfile.gettempdir())
        with storage_errors("write", folder):
            make_folder(folder)
            with tempfile.TemporaryFile(dir=folder, prefix=TEMPORARY_PREFIX) as file:
                yield file

    @abstractmethod
    def append(self, rel: str, data: bytes) -> None:
        """Add `data` to the end of `rel`, a log that nothing depends on: a crash may cut its last lines."""

    @abstractmethod
    def delete(self, rel: str) -> None:
        """Remove `rel`; that it is not there is fine."""

    @abstractmethod
    def lease(self, purpose: str) -> AbstractContextManager[None]:
        """Hold the exclusive right to commit while the context lasts, or raise `LeaseHeld` naming who has it."""

    @abstractmethod
    def check_lease(self) -> None:
        """Raise `LeaseHeld` if another driver has taken the lease that this store holds. Ask before each commit."""

    @abstractmethod
    def lease_owner(self) -> LeaseOwner | None:
        """Who holds the lease now, or None."""

    def inside(self, rel: str) -> str:
        """`rel` without its `.` and empty parts; a path that leaves the folder is an `InputError`."""
        parts = [part for part in rel.split("/") if part not in ("", ".")]  # of many thousands of paths, so no Path
        if not parts or "\0" in rel or "\\" in rel or rel.startswith("/") or ".." in parts:
            raise InputError(f"{rel!r} is not a path inside {self.location}: it must be relative and must not use ..")
        return "/".join(parts)


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL rather than a path."""
    scheme, found, _ = str(location).partition("://")
    return bool(found) and scheme.isascii() and scheme.replace("+", "").replace("-", "").isalnum()


def _local_path(text: str) -> Path:
    if text.startswith("file://"):
        url = urlsplit(text)
        if url.netloc not in ("", "localhost"):
            raise StorageError(f"{text} is on another machine: give a path or a file:// URL of a local folder")
        text = unquote(url.path)
    return Path(text).absolute()
