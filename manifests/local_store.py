"""A store on a disk of this machine, or on whatever is mounted there."""

from __future__ import annotations

import builtins
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from manifests.atomic import TEMPORARY_PREFIX, make_folder, storage_errors, write_atomically
from manifests.errors import StorageError
from manifests.lease import LeaseOwner, hold_lease, lease_owner
from manifests.storage import LEASE_NAME, FileStat, Store

if TYPE_CHECKING:
    import pyarrow as pa

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""What the system says of a path at which nothing is, or nothing can be."""


class LocalStore(Store):
    """A folder of the file system. Writes are a temporary file, fsync and a rename; the lease is the kernel's lock."""

    is_local = True
    piece = 4 << 20

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self.location = str(self._root)

    def path(self, rel: str) -> Path:
        """The local path of `rel`; a path that leaves the folder is an `InputError`."""
        return self._root / self.inside(rel)

    def where(self, rel: str) -> str:
        return str(self.path(rel))

    def exists(self, rel: str) -> bool:
        return self._look(rel) is not None

    def stat(self, rel: str) -> FileStat | None:
        found = self._look(rel)
        return FileStat(found.st_size, found.st_mtime_ns) if found and stat.S_ISREG(found.st_mode) else None

    def size(self, rel: str) -> int:
        path = self.path(rel)
        with storage_errors("read", path):
            return path.stat().st_size

    def sizes(self, rels: Sequence[str]) -> builtins.list[int | None]:
        names = [self.inside(rel) for rel in rels]
        found: dict[str, int] = {}
        for below in {name.rpartition("/")[0] for name in names}:
            folder = self._root / below
            start = f"{below}/" if below else ""
            if not folder.is_dir():
                continue
            with storage_errors("list", folder), os.scandir(folder) as entries:
                found |= {start + entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        return [found.get(name) for name in names]

    def read(self, rel: str) -> bytes:
        path = self.path(rel)
        with storage_errors("read", path):
            return path.read_bytes()

    def read_range(self, rel: str, offset: int, length: int) -> bytes:
        path = self.path(rel)
        with storage_errors("read", path), path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)

    def read_many(self, rels: Iterable[str]) -> Iterator[bytes]:
        return map(self.read, rels)

    def open_input(self, rel: str) -> pa.NativeFile:
        import pyarrow as pa

        path = self.path(rel)
        with storage_errors("read", path):
            return pa.OSFile(str(path))

    def fault(self, rel: str, error: Exception) -> StorageError | None:  # noqa: ARG002
        return None

    def walk(
        self,
        prefix: str = "",
        pathless: builtins.list[str] | None = None,  # noqa: ARG002 - every file on a disk has a path
    ) -> Iterator[tuple[str, FileStat]]:
        for rel in self._names(prefix):
            found = self.stat(rel) if "\\" not in rel else None
            if found:
                yield rel, found

    def list(self, prefix: str = "") -> builtins.list[str]:
        return sorted(self._names(prefix))

    def write(self, rel: str, data: bytes | memoryview | BinaryIO) -> None:
        path = self.path(rel)
        with storage_errors("write", path):
            write_atomically(path, data)

    def append(self, rel: str, data: bytes) -> None:
        path = self.path(rel)
        with storage_errors("write", path):
            make_folder(path.parent)
            with path.open("ab") as file:
                file.write(data)

    def delete(self, rel: str) -> None:
        path = self.path(rel)
        with storage_errors("delete", path):
            path.unlink(missing_ok=True)

    def lease(self, purpose: str) -> AbstractContextManager[None]:
        return hold_lease(self._root / LEASE_NAME, purpose)

    def check_lease(self) -> None:
        """Nothing to do: the kernel gives its lock to nobody else while this process lives."""

    def lease_owner(self) -> LeaseOwner | None:
        return lease_owner(self._root / LEASE_NAME)

    def _look(self, rel: str) -> os.stat_result | None:
        path = self.path(rel)
        with storage_errors("read", path):
            try:
                return path.stat()
            except OSError as error:
                if error.errno in _ABSENT:
                    return None
                raise

    def _names(self, prefix: str) -> Iterator[str]:
        folder = self._root / prefix.rpartition("/")[0]
        with storage_errors("list", folder):
            for parent, _, names in os.walk(folder, onerror=_raise_unless_absent):
                base = Path(parent).relative_to(self._root).as_posix()
                for name in names:
                    rel = name if base == "." else f"{base}/{name}"
                    if rel.startswith(prefix) and not name.startswith(TEMPORARY_PREFIX):
                        yield rel


def _raise_unless_absent(error: OSError) -> None:
    if error.errno not in _ABSENT:
        raise error
