"""Put a file on a local disk whole or not at all, and turn what the system refuses into one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from manifests.errors import StorageError

TEMPORARY_PREFIX = ".tmp-"
"""How names start that a killed writer may leave behind; nothing reads them."""

_CHUNK = 8 << 20

_ADVICE = {
    errno.ENOSPC: "free some space and run the command again",
    errno.EDQUOT: "free some of your quota and run the command again",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "choose a folder on a writable file system",
    errno.ENOENT: "check that the path is right and its disk is mounted",
    errno.ENOTDIR: "choose a path that is not below a file",
    errno.EEXIST: "choose a path that is not below a file",
    errno.EISDIR: "choose a path that is not a folder",
    errno.ENOLCK: "choose a file system that supports locks",
    errno.EOPNOTSUPP: "choose a file system that supports locks",
}

_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}
"""What the system says where a file cannot have a second name: another disk, or a file system or owner that forbids it."""


@contextlib.contextmanager
def storage_errors(action: str, path: Path | str) -> Iterator[None]:
    """Raise `StorageError` (what, where, why, what to do) for any `OSError` of the block."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the disk")
        reason = (error.strerror or str(error)).lower()
        raise StorageError(f"cannot {action} {path}: {reason}; {advice}") from error


def write_atomically(path: Path, data: bytes | memoryview | BinaryIO) -> None:
    """Replace `path` by `data`, or by what an open file holds: a reader, or a crash at any moment, sees the old content
    or the new.

    Makes missing parent folders. Raises `OSError`, and then leaves no half file behind.
    """
    make_folder(path.parent)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}")
    # Not tempfile: its files are 0600, and a token set is shared under the umask.
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "wb", buffering=0) as file:
            for piece in pieces(data):
                rest = memoryview(piece).cast("B")
                while rest:
                    rest = rest[file.write(rest[:_CHUNK]) :]
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # also on Ctrl-C
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush(path.parent)


def pieces(data: bytes | memoryview | BinaryIO) -> Iterator[bytes | memoryview]:
    """The bytes themselves, or the content of an open file a few megabytes at a time."""
    if isinstance(data, bytes | memoryview):
        yield data
        return
    data.seek(0)
    while piece := data.read(_CHUNK):
        yield piece


def make_folder(folder: Path) -> None:
    """Make a folder and its parents so that they survive a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Have a file or a folder's list of names on the disk before this returns."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def link_file(source: Path, target: Path) -> bool:
    """Give a file that never changes a second name, atomically; False where the two places cannot share one file."""
    with storage_errors("write", target):
        make_folder(target.parent)
        try:
            os.link(source, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _NO_LINK:
                return False
            raise
        flush(target.parent)
    return True
