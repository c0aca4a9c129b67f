"""What an image reference means: an image id, a file inside the root, its bytes.

A reference is text that somebody else wrote. It names a file below the image root in the POSIX way, and nothing
else: not an absolute path, not a URL, not a home folder, and no symbolic link leads it out.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from manifests.rejects import Reject, RejectReason

MAX_FILE_BYTES = 2**31 - 1
"""Largest image file that is read into memory."""

_MAX_NAME_BYTES = 255  # of one path component, on every usual file system
_MAX_REF_BYTES = 4_095  # of a whole path on Linux
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:", re.ASCII)
# What the file system says about one file, as opposed to failures of the disk or the network.
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR})
_UNREADABLE = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO})


def image_id_of(ref: object) -> str:
    """The image id of a reference: its normalised POSIX path below the image root.

    "./a//b/../c.jpg" and "a/c.jpg" are the same image. Case and Unicode normal form are kept, as file systems do.
    An id that this function returned maps to itself. Raises Reject(outside_root) for what points anywhere else
    (absolute paths, "..", "~/", drive letters, URLs), Reject(unreadable) for what cannot be a file name
    (not text, NUL, backslash, half a surrogate pair, too long), Reject(missing) for a reference to nothing.
    """
    if not isinstance(ref, str):
        raise Reject(RejectReason.UNREADABLE, f"an image reference is text, not {type(ref).__name__}")
    shown = repr(ref if len(ref) <= 200 else ref[:200] + "...")
    if "\0" in ref:
        raise Reject(RejectReason.UNREADABLE, f"the image reference {shown} holds a NUL character")
    try:
        encoded = ref.encode()
    except UnicodeEncodeError:
        raise Reject(RejectReason.UNREADABLE, f"the image reference {shown} holds half a surrogate pair") from None
    if _URL.match(ref):
        raise Reject(RejectReason.OUTSIDE_ROOT, f"{shown} is a URL; download it and refer to it below the image root")
    if ref.startswith(("/", "\\")) or _DRIVE.match(ref):
        raise Reject(RejectReason.OUTSIDE_ROOT, f"{shown} is an absolute path; write it relative to the image root")
    if "\\" in ref:
        raise Reject(RejectReason.UNREADABLE, f"the image reference {shown} holds a backslash; write / between folders")
    parts: list[str] = []
    for part in ref.split("/"):
        if part == "..":
            if not parts:
                raise Reject(RejectReason.OUTSIDE_ROOT, f"{shown} leaves the image root")
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    if not parts:
        raise Reject(RejectReason.MISSING, f"the image reference {shown} names no file")
    if parts[0].startswith("~") and len(parts) > 1:
        raise Reject(RejectReason.OUTSIDE_ROOT, f"{shown} is below a home folder; write it relative to the image root")
    if _URL.match(parts[0]) or _DRIVE.match(parts[0]):
        raise Reject(RejectReason.OUTSIDE_ROOT, f"{shown} is an absolute path; write it relative to the image root")
    if len(encoded) > _MAX_REF_BYTES or any(len(part.encode()) > _MAX_NAME_BYTES for part in parts):
        raise Reject(RejectReason.UNREADABLE, f"the image reference {shown} is longer than a file name can be")
    return "/".join(parts)


def resolve_inside(root: Path | str, ref: object) -> Path:
    """The real path of a reference, symbolic links followed; it need not exist.

    Raises what `image_id_of` raises, and Reject(outside_root) when a link leads out of the (resolved) root.
    """
    image_id = image_id_of(ref)
    real_root = os.path.realpath(root)
    path = os.path.realpath(Path(real_root, image_id))
    if os.path.commonpath((real_root, path)) != real_root:
        message = f"{image_id!r} is a symbolic link out of {real_root}; copy the file, or set the root to where it lies"
        raise Reject(RejectReason.OUTSIDE_ROOT, message)
    return Path(path)


def read_image(root: Path | str, ref: object) -> bytes:
    """The bytes of a referenced image.

    Raises what `resolve_inside` raises, Reject(missing) when there is no such file, Reject(unreadable) when it is a
    folder, a device or not permitted, Reject(unsupported) above MAX_FILE_BYTES. Other OSErrors (the disk, the network)
    pass: they say nothing about the image.
    """
    path = resolve_inside(root, ref)
    try:
        # A named pipe would block the open for ever without O_NONBLOCK, which regular files ignore.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # Before fdopen, which refuses a folder and then leaves its descriptor open.
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise Reject(RejectReason.UNREADABLE, f"{path} is not a regular file")
            if found.st_size > MAX_FILE_BYTES:
                message = f"{path} has {found.st_size} bytes, and files above {MAX_FILE_BYTES} are not read"
                raise Reject(RejectReason.UNSUPPORTED, message)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _MISSING:
            raise Reject(RejectReason.MISSING, f"there is no file {path}") from None
        if error.errno in _UNREADABLE:
            raise Reject(RejectReason.UNREADABLE, f"{path} cannot be read ({error.strerror})") from None
        raise
