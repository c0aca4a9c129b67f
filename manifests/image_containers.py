"""Reading images out of the containers they lie in: tar, tar.zst, Parquet and Arrow files.

A locator is (file, offset, length). What the offset counts: bytes of a `.tar`, bytes of the decompressed stream of a
`.tar.zst`, rows of a `.parquet` or `.arrow`. The last three are read front to back, once for all the images that are
wanted of them, in whatever order the threads of a worker ask.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from manifests.refs import MAX_FILE_BYTES
from manifests.rejects import Reject, RejectReason
from manifests.storage import Store
from manifests.table_files import open_table
from manifests.zstd_stream import DamagedZstd, ZstdStream

WINDOW_BYTES = 2**23
"""Images of a tar in an object store are fetched so many bytes at a time, since each request costs tens of milliseconds."""

_SKIP_BYTES = 2**20

Wanted = Sequence[tuple[int, int]]
"""The (offset, length) that will be asked for, each as often as it will be."""


class Container(ABC):
    """One open container. `read` may be called from several threads."""

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """The bytes at a locator. Raises Reject for what is wrong with it, `OSError` or `StorageError` for the storage."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""


class Tar(Container):
    """A plain tar: a ranged read for each image on a disk, one for each window of them in an object store."""

    def __init__(self, store: Store, rel: str, wanted: Wanted) -> None:
        self._store, self._rel = store, rel
        self._file = store.open_input(rel)
        self._size = int(self._file.size())
        self._windows = {} if store.is_local else _windows(wanted)

    def read(self, offset: int, length: int) -> bytes:
        if length > MAX_FILE_BYTES:
            raise Reject(RejectReason.UNSUPPORTED, f"{length} bytes, and images above {MAX_FILE_BYTES} are not read")
        if offset < 0 or length < 0 or offset + length > self._size:
            raise Reject(RejectReason.TRUNCATED, f"{self._store.where(self._rel)} ends before byte {offset + length}")
        window = self._windows.get(offset)
        if window is None:
            return self._fetch(offset, length)
        return window.read(offset, length, self._fetch)

    def close(self) -> None:
        self._file.close()

    def _fetch(self, offset: int, length: int) -> bytes:
        try:
            data: bytes = self._file.read_at(length, offset)
        except OSError as error:
            raise self._store.fault(self._rel, error) or error from error
        if len(data) < length:
            raise Reject(RejectReason.TRUNCATED, f"{self._store.where(self._rel)} ends before byte {offset + length}")
        return data


class _Window:
    """A run of images that is fetched at once and forgotten when each has been handed out."""

    def __init__(self, start: int) -> None:
        self.start = self.end = start
        self.claims = 0
        self._lock = threading.Lock()
        self._data: bytes | None = None

    def read(self, offset: int, length: int, fetch: Callable[[int, int], bytes]) -> bytes:
        with self._lock:
            if self.claims <= 0:
                return fetch(offset, length)
            if self._data is None:
                self._data = fetch(self.start, self.end - self.start)
            piece = self._data[offset - self.start : offset - self.start + length]
            self.claims -= 1
            if not self.claims:
                self._data = None
        return piece


def _windows(wanted: Wanted) -> dict[int, _Window]:
    windows: dict[int, _Window] = {}
    window: _Window | None = None
    for offset, length in sorted(wanted):
        if window is None or offset + length - window.start > WINDOW_BYTES:
            window = _Window(offset)
        window.end = max(window.end, offset + length)
        window.claims += 1
        windows[offset] = window
    return windows


class Forward(Container):
    """A container that can only be read front to back.

    What is wanted is read in order and kept until it is asked for, so that memory holds what the threads of a worker
    are ahead of each other and no more. What is asked for once more costs a pass of its own.
    """

    def __init__(self, store: Store, rel: str, wanted: Wanted) -> None:
        self._store, self._rel = store, rel
        self._claims = Counter(offset for offset, _ in wanted)
        self._queue = deque(sorted(dict(wanted).items()))
        self._kept: dict[int, bytes | Reject] = {}
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        with self._lock:
            if not self._claims[offset]:
                return self._alone(offset, length)
            while offset not in self._kept:
                self._advance()
            found = self._kept[offset]
            self._claims[offset] -= 1
            if not self._claims[offset]:
                del self._kept[offset]
        if isinstance(found, Reject):
            raise found
        return found

    def close(self) -> None:
        self.rewind()
        self._kept.clear()

    @abstractmethod
    def next(self, offset: int, length: int) -> bytes:
        """What is at `offset`, which is never before that of the last call, unless `rewind` came between."""

    @abstractmethod
    def rewind(self) -> None:
        """Close what is open; the next call of `next` starts from the front."""

    def again(self) -> Forward:
        """The same file, opened a second time, with nothing wanted."""
        return type(self)(self._store, self._rel, [])

    def _advance(self) -> None:
        offset, length = self._queue[0]
        found: bytes | Reject
        try:
            found = self.next(offset, length)
        except Reject as reject:
            found = reject
        except OSError:
            self.rewind()
            raise
        self._queue.popleft()
        self._kept[offset] = found

    def _alone(self, offset: int, length: int) -> bytes:
        other = self.again()
        try:
            return other.next(offset, length)
        finally:
            other.close()


class TarZst(Forward):
    """A compressed tar: the stream is decompressed up to the last image that is wanted."""

    def __init__(self, store: Store, rel: str, wanted: Wanted) -> None:
        super().__init__(store, rel, wanted)
        self._file: Any = None
        self._stream: ZstdStream | None = None
        self._position = 0

    def next(self, offset: int, length: int) -> bytes:
        if length > MAX_FILE_BYTES:
            raise Reject(RejectReason.UNSUPPORTED, f"{length} bytes, and images above {MAX_FILE_BYTES} are not read")
        if self._stream is None:
            self._file = self._store.open_input(self._rel)
            self._stream, self._position = ZstdStream(self._file), 0
        try:
            while self._position < offset and self._take(min(_SKIP_BYTES, offset - self._position)):
                pass
            data = self._take(length)
        except DamagedZstd as error:
            raise Reject(RejectReason.UNREADABLE, f"{self._store.where(self._rel)} is {error}") from None
        except OSError as error:
            raise self._store.fault(self._rel, error) or error from error
        if self._position != offset + length:
            raise Reject(RejectReason.TRUNCATED, f"{self._store.where(self._rel)} ends before byte {offset + length}")
        return data

    def rewind(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._stream = None

    def _take(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end of the stream."""
        assert self._stream is not None  # noqa: S101 - opened by `next`
        taken = bytearray(size)
        view, filled = memoryview(taken), 0
        while filled < size and (count := self._stream.readinto(view[filled:])):
            filled += count
        self._position += filled
        return bytes(view[:filled])


class Table(Forward):
    """A Parquet or Arrow file with a column of images: bytes, or the {bytes, path} of Hugging Face data sets.

    `beside` reads the picture that a cell names by its path instead of holding it.
    """

    def __init__(self, store: Store, rel: str, wanted: Wanted, column: str, beside: Callable[[str], bytes]) -> None:
        super().__init__(store, rel, wanted)
        self._column, self._beside = column, beside
        self._file = open_table(store, rel)
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._first = self._end = 0
        self._cells: pa.Array | None = None

    def next(self, offset: int, length: int) -> bytes:  # noqa: ARG002 - a cell knows its length
        if not 0 <= offset < self._file.rows:
            where = f"{self._store.where(self._rel)} has {self._file.rows} rows"
            raise Reject(RejectReason.MISSING, f"there is no row {offset}: {where}")
        try:
            while self._cells is None or offset >= self._end:
                self._read_on(offset)
        except (pa.ArrowException, OSError) as error:
            self.rewind()
            if fault := self._store.fault(self._rel, error):
                raise fault from error
            if isinstance(error, OSError) and error.errno is not None:  # the disk's; damage has no number
                raise
            message = (
                f"row {offset} of {self._store.where(self._rel)} is damaged ({' '.join(str(error).split())[:200]})"
            )
            raise Reject(RejectReason.UNREADABLE, message) from None
        return self._bytes_of(self._cells[offset - self._first], offset)

    def rewind(self) -> None:
        self._batches, self._cells, self._first, self._end = iter(()), None, 0, 0

    def again(self) -> Forward:
        return Table(self._store, self._rel, [], self._column, self._beside)

    def close(self) -> None:
        super().close()
        self._file.close()

    def _read_on(self, row: int) -> None:
        batch = next(self._batches, None)
        if batch is None or row >= self._file.group_end(self._first):
            self._end, self._batches = self._file.batches(row, [self._column])
            batch = next(self._batches)
        self._first, self._end = self._end, self._end + batch.num_rows
        self._cells = batch.column(0)

    def _bytes_of(self, cell: pa.Scalar, row: int) -> bytes:
        value = cell.as_py()
        if isinstance(value, dict):
            path = value.get("path")
            value = value.get("bytes")
            if value is None and path is not None:
                return self._beside(path)
        if value is None:
            where = f"row {row} of {self._store.where(self._rel)}"
            raise Reject(RejectReason.MISSING, f"{where} has nothing in {self._column!r}")
        return bytes(value)
