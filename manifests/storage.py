"""Where a token set is kept: a folder with atomic writes and a lease for the one driver that may commit.

Local disk today; other file systems come behind the same `Store`, so that the code around it stays as it is.
"""

from __future__ import annotations

import builtins
import errno
import os
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from manifests.atomic import TEMPORARY_PREFIX, storage_errors, write_atomically
from manifests.errors import InputError, StorageError
from manifests.hashes import cache_dir, file_sha256
from manifests.lease import LeaseOwner, hold_lease, lease_owner

__all__ = ["LEASE_NAME", "TEMPORARY_PREFIX", "LeaseOwner", "Store", "cache_dir", "file_sha256"]

LEASE_NAME = ".lease"

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}
"""What the system says of a path at which nothing is, or nothing can be."""


class Store:
    """A folder addressed by relative POSIX paths. Its methods raise `StorageError` when the system refuses."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def open(cls, location: str | Path) -> Store:
        """A store at a path or `file://` URL; it need not exist yet, the first write makes it."""
        text = str(location)
        if "://" in text:
            url = urlsplit(text)
            if url.scheme != "file" or url.netloc not in ("", "localhost"):
                raise StorageError(f"{text} is not on this machine: give a path or a file:// URL of a local folder")
            text = unquote(url.path)
        return cls(Path(text).absolute())

    @property
    def location(self) -> str:
        """The absolute path of the folder."""
        return str(self._root)

    def path(self, rel: str) -> Path:
        """The local path of `rel`; a path that leaves the folder is an `InputError`."""
        if not rel or "\0" in rel or "\\" in rel or rel.startswith("/") or ".." in PurePosixPath(rel).parts:
            raise InputError(f"{rel!r} is not a path inside {self.location}: it must be relative and must not use ..")
        return self._root / rel

    def exists(self, rel: str) -> bool:
        """Whether `rel` is a file or folder of the store."""
        return self.size_if_there(rel) is not None

    def size_if_there(self, rel: str) -> int | None:
        """The size of `rel` in bytes, or None where nothing is."""
        path = self.path(rel)
        with storage_errors("read", path):
            try:
                return path.stat().st_size
            except OSError as error:
                if error.errno in _ABSENT:
                    return None
                raise

    def size(self, rel: str) -> int:
        """The size of `rel` in bytes."""
        path = self.path(rel)
        with storage_errors("read", path):
            return path.stat().st_size

    def read(self, rel: str) -> bytes:
        """The content of `rel`."""
        path = self.path(rel)
        with storage_errors("read", path):
            return path.read_bytes()

    def write(self, rel: str, data: bytes | memoryview) -> None:
        """Put `data` at `rel`: a reader, or a crash at any moment, sees the old content or the new."""
        path = self.path(rel)
        with storage_errors("write", path):
            write_atomically(path, data)

    def append(self, rel: str, data: bytes) -> None:
        """Add `data` to the end of `rel`, a log that nothing depends on: a crash may cut its last line."""
        path = self.path(rel)
        with storage_errors("write", path), path.open("ab") as file:
            file.write(data)

    def list(self, prefix: str = "") -> builtins.list[str]:
        """The relative paths that start with `prefix`, sorted; temporary files are left out."""
        folder = self._root / prefix.rpartition("/")[0]
        found = []
        with storage_errors("list", folder):
            for parent, _, names in os.walk(folder, onerror=_raise_unless_absent):
                base = Path(parent).relative_to(self._root).as_posix()
                for name in names:
                    rel = name if base == "." else f"{base}/{name}"
                    if rel.startswith(prefix) and not name.startswith(TEMPORARY_PREFIX):
                        found.append(rel)
        return sorted(found)

    def delete(self, rel: str) -> None:
        """Remove `rel`; that it is not there is fine."""
        path = self.path(rel)
        with storage_errors("delete", path):
            path.unlink(missing_ok=True)

    def lease(self, purpose: str) -> AbstractContextManager[None]:
        """Hold the exclusive right to commit while the context lasts, or raise `LeaseHeld` naming who has it."""
        return hold_lease(self._root / LEASE_NAME, purpose)

    def lease_owner(self) -> LeaseOwner | None:
        """Who holds the lease now, or None."""
        return lease_owner(self._root / LEASE_NAME)


def _raise_unless_absent(error: OSError) -> None:
    if error.errno not in _ABSENT:
        raise error
