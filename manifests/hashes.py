"""File hashes, remembered between runs: a no-op rerun must not read gigabytes of weights again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from pathlib import Path

from manifests.atomic import storage_errors, write_atomically

_FRESH_NS = 2_000_000_000
_lock = threading.Lock()
_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where asvr keeps what it can make again: `$ASVR_CACHE`, else `~/.cache/asvr`."""
    return Path(os.environ.get("ASVR_CACHE") or Path.home() / ".cache" / "asvr")


def file_sha256(path: Path) -> str:
    """sha256 of a file in hex, remembered by real path, size and mtime in `cache_dir()`.

    A file touched in the last two seconds is hashed but not remembered: a second edit could keep its mtime.
    Raises `StorageError` when the file cannot be read.
    """
    with storage_errors("read", path):
        real = path.resolve()
        found = real.stat()
        identity = [found.st_size, found.st_mtime_ns]
        known = _load().get(str(real))
        if isinstance(known, list) and known[:2] == identity and len(known) == 3:
            return str(known[2])
        with real.open("rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()
        after = real.stat()
    unchanged = [after.st_size, after.st_mtime_ns] == identity
    if unchanged and time.time_ns() - found.st_mtime_ns > _FRESH_NS:
        _remember(str(real), [*identity, value])
    return value


def _load() -> dict[str, object]:
    try:
        loaded = json.loads((cache_dir() / "sha256.json").read_bytes())
    except (OSError, ValueError):
        return {}  # absent or damaged: the files are hashed again
    return loaded if isinstance(loaded, dict) else {}


def _remember(real: str, entry: list[int | str]) -> None:
    with _lock:  # another process may still overwrite this entry; then one file is hashed once more
        known = _load() | {real: entry}
        try:
            write_atomically(cache_dir() / "sha256.json", json.dumps(known, indent=0, sort_keys=True).encode())
        except OSError as error:
            _log.warning("cannot remember file hashes in %s: %s", cache_dir(), error.strerror)
