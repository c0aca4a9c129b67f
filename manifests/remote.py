"""The clients behind object stores: a URL becomes a handful of operations on keys.

`s3://` and `gs://` go through Arrow's own clients, any other scheme through the fsspec implementation of that name
(`hf://` is huggingface_hub's). Credentials and endpoints come from where those clients look for them: the environment
(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL_S3, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN) and the
clients' configuration files. A URL that carries any is refused, so that none ends up in a manifest.
"""

from __future__ import annotations

import configparser
import ctypes
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from manifests.errors import EnvironmentProblem, StorageError
from manifests.storage import FileStat

CONNECT_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 10
ATTEMPTS = 3
"""Together they bound the wait for an S3 server that went silent to under a minute."""
GCS_PATIENCE_S = 20
"""Google's client tries for up to twice that."""
PATHLESS = frozenset({"", ".", ".."})
"""Parts that no relative path has: an object store keeps them, where a disk would fold `a//b` and `a/../b`."""


class Files(Protocol):
    """Operations on the keys of a file system. They raise what the client raises: see `client_errors`."""

    def stat(self, key: str) -> FileStat | None: ...

    def exists(self, key: str) -> bool: ...

    def find(self, folder: str) -> Iterator[tuple[str, FileStat]]: ...

    def open(self, key: str) -> pa.NativeFile: ...

    def put(self, key: str, pieces: Iterable[bytes | memoryview]) -> None: ...

    def remove(self, key: str) -> None: ...

    def lacks(self, bucket: str) -> bool: ...


@dataclass(frozen=True)
class Remote:
    """A folder of an object store: its URL without a trailing slash, its client, and the key its files start with."""

    url: str
    files: Files
    root: str

    def bucket_is_gone(self) -> bool:
        """Whether the store says that there is no such bucket; a store that will not tell does not say so."""
        return self.files.lacks(self.root.partition("/")[0])


def open_remote(url: str) -> Remote:
    """The folder at `url`; nothing is asked of the network yet.

    Raises `StorageError` for a URL with credentials, a query, no bucket or a path that has an empty, `.` or `..` part
    (one slash may end it), or of a scheme that nobody knows, and `EnvironmentProblem` when the package of its scheme is
    not installed.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise StorageError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path} is given with credentials in it: "
            "take them out, and set them in the environment"
        )
    if "?" in url or "#" in url or (parts.netloc in PATHLESS and f"{parts.scheme}://{parts.netloc}" != "memory://"):
        raise StorageError(
            f"{parts.scheme}://{parts.netloc}{parts.path} is not the URL of a folder: "
            f"write {parts.scheme}://BUCKET/FOLDER, and set the endpoint and region in the environment"
        )
    path = parts.path.removeprefix("/").removesuffix("/")
    if path and PATHLESS & set(path.split("/")):
        meant = posixpath.normpath(f"/{path.lstrip('/')}").rstrip("/")
        raise StorageError(
            f"{url} has an empty, . or .. part, which is a name like any other in an object store: "
            f"write {parts.scheme}://{parts.netloc}{meant}"
        )
    scheme, _, key = url.rstrip("/").partition("://")
    if scheme in ("s3", "s3a"):
        return Remote(url.rstrip("/"), _ArrowFiles(_s3()), key)
    if scheme in ("gs", "gcs"):
        retries = timedelta(seconds=GCS_PATIENCE_S)
        return Remote(url.rstrip("/"), _ArrowFiles(pafs.GcsFileSystem(retry_time_limit=retries)), key)
    return _fsspec(scheme, url.rstrip("/"))


def _s3() -> pafs.S3FileSystem:
    """Arrow's client reads credentials and region as every AWS tool does, but not these two settings."""
    own: dict[str, Any] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or _profile_endpoint()
    if endpoint:
        own["endpoint_override"] = endpoint
    if authorities := os.environ.get("AWS_CA_BUNDLE"):
        own["tls_ca_file_path"] = authorities
    return pafs.S3FileSystem(
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # a small object is then one request
        **own,
    )


def _profile_endpoint() -> str | None:
    """The `endpoint_url` of the profile in use, from the AWS configuration file."""
    file = os.environ.get("AWS_CONFIG_FILE") or Path.home() / ".aws" / "config"
    profile = os.environ.get("AWS_PROFILE") or "default"
    settings = configparser.RawConfigParser()
    try:
        settings.read(file, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        raise StorageError(f"{file} cannot be read ({str(error).splitlines()[0]}): correct it") from error
    for section in (profile, f"profile {profile}"):
        if endpoint := settings.get(section, "endpoint_url", fallback=None):
            return endpoint
    return None


class _ArrowFiles:
    """A client of Arrow's. The time of an object is cut to whole seconds: a listing may know more digits than a look."""

    def __init__(self, filesystem: pafs.FileSystem) -> None:
        self._fs = filesystem
        self._lists_folders = isinstance(filesystem, pafs.S3FileSystem)

    def stat(self, key: str) -> FileStat | None:
        found = self._fs.get_file_info(key)
        return _stat(found) if found.type == pafs.FileType.File else None

    def exists(self, key: str) -> bool:
        return bool(self._fs.get_file_info(key).type != pafs.FileType.NotFound)

    def find(self, folder: str) -> Iterator[tuple[str, FileStat]]:
        # Arrow returns a whole listing at once. S3 is listed folder by folder on the first level, so that it is less;
        # of GCS that would miss folders which are nothing but a part of names.
        entries = self._listing(folder, recursive=not self._lists_folders)
        below = [entry.path for entry in entries if self._lists_folders and entry.type == pafs.FileType.Directory]
        if any(path.rstrip("/") == folder for path in below):
            # A key `FOLDER//x` makes a folder without a name, which Arrow takes for FOLDER itself.
            entries, below = self._listing(folder, recursive=True), []
        for listing in chain([entries], (self._listing(path, recursive=True) for path in below)):
            for entry in listing:
                if entry.type == pafs.FileType.File:
                    yield entry.path, _stat(entry)

    def _listing(self, folder: str, *, recursive: bool) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(folder, recursive=recursive, allow_not_found=True)
        return list(self._fs.get_file_info(selector))

    def open(self, key: str) -> pa.NativeFile:
        return self._fs.open_input_file(key)

    def put(self, key: str, pieces: Iterable[bytes | memoryview]) -> None:
        stream = self._fs.open_output_stream(key, compression=None)  # else it compresses what ends in .zst once more
        try:
            for piece in pieces:
                stream.write(piece)
            stream.close()
        except BaseException:  # also on Ctrl-C
            _abandon(stream)
            raise

    def remove(self, key: str) -> None:
        self._fs.delete_file(key)

    def lacks(self, bucket: str) -> bool:
        try:
            return bool(self._fs.get_file_info(bucket).type == pafs.FileType.NotFound)
        except OSError:  # not everybody who may read objects may ask for the bucket
            return False


def _abandon(stream: pa.NativeFile) -> None:
    """Keep half an object from appearing: a stream completes its upload when it is closed, and has no way to abort it.

    Its destructor closes it too, also when the interpreter ends. So it gets one reference that nobody gives back.
    A stream whose close failed is closed.
    """
    if not stream.closed:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(stream))


def _stat(info: pafs.FileInfo) -> FileStat:
    return FileStat(int(info.size), (info.mtime_ns or 0) // 1_000_000_000 * 1_000_000_000)


def _fsspec(scheme: str, url: str) -> Remote:
    import fsspec

    options: dict[str, Any] = {"expand_info": True} if scheme == "hf" else {}  # else the hub tells no times
    try:
        filesystem = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        raise EnvironmentProblem(f"{url} needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise StorageError(f"{url} cannot be opened ({error}): use s3://, gs://, hf:// or a path") from error
    root = str(filesystem._strip_protocol(url))
    repository = scheme == "hf" and not root.startswith("buckets/")
    return Remote(url, _FsspecFiles(filesystem, writable=not repository), root)


class _FsspecFiles:
    """A client of fsspec's. Its listings are never taken from its cache: other processes write here too."""

    def __init__(self, filesystem: Any, *, writable: bool) -> None:
        self._fs, self._writable = filesystem, writable

    def stat(self, key: str) -> FileStat | None:
        info = self._info(key)
        return _from_info(info) if info and info["type"] == "file" else None

    def exists(self, key: str) -> bool:
        return self._info(key) is not None

    def find(self, folder: str) -> Iterator[tuple[str, FileStat]]:
        self._fs.invalidate_cache()
        for key, info in self._fs.find(folder, detail=True).items():
            yield key, _from_info(info)

    def open(self, key: str) -> pa.NativeFile:
        self._fs.invalidate_cache()
        if self._fs.protocol == "memory":  # its open gives all who ask one file object, which has one position
            return pa.BufferReader(self._fs.cat_file(key))
        return pa.PythonFile(self._fs.open(key, "rb"), mode="r")

    def put(self, key: str, pieces: Iterable[bytes | memoryview]) -> None:
        if not self._writable:
            raise StorageError(
                f"hf://{key} is in a repository of the hub, where each write is a commit: "
                "give hf://buckets/OWNER/NAME, or upload the finished folder"
            )
        self._fs.pipe_file(key, b"".join(pieces))

    def remove(self, key: str) -> None:
        self._fs.rm_file(key)

    def lacks(self, bucket: str) -> bool:  # noqa: ARG002
        """Never: schemes differ in what the first part of a key is, and their clients name a missing one themselves."""
        return False

    def _info(self, key: str) -> dict[str, Any] | None:
        self._fs.invalidate_cache()
        try:
            info: dict[str, Any] = self._fs.info(key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return info


def _from_info(info: dict[str, Any]) -> FileStat:
    names = ("mtime", "last_modified", "LastModified", "updated", "uploaded_at", "created")
    when: Any = next((info[name] for name in names if info.get(name)), None)
    if when is None and info.get("last_commit"):
        when = info["last_commit"].date
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    seconds = when.timestamp() if isinstance(when, datetime) else float(when or 0)
    return FileStat(int(info["size"] or 0), int(seconds) * 1_000_000_000)
