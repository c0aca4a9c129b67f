"""Reading zstd in bounded memory, whatever the file claims to hold."""

from __future__ import annotations

import io
from typing import Any, Protocol

MOST_TIMES_LARGER = 1_000
"""So many times its size a file may become; more is not data, it is a decompression bomb."""

_ALWAYS_ALLOWED = 2**30

_PIECE = 2_048  # zstd can make 32,768 times as many bytes of what goes in as come out at once
_READ_AHEAD = 2**20
_LARGEST_WINDOW = 2**27


class DamagedZstd(Exception):
    """The file is cut off, damaged, no zstd or a bomb; the message completes "FILE is …"."""


class Readable(Protocol):
    """A file as far as it is needed here."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        ...


class ZstdStream(io.RawIOBase):
    """The decompressed bytes of a file of one or more zstd frames.

    Raises `DamagedZstd` where the file stops being readable; everything before that place has been delivered.
    `bomb_limit` is off for callers that limit what they read themselves.
    """

    def __init__(self, file: Readable, *, bomb_limit: bool = True) -> None:
        import zstandard

        self._file = file
        self._bomb_limit = bomb_limit
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._in_frame = False
        self._ready = memoryview(b"")
        self._input = memoryview(b"")
        self._at = 0  # in the input
        self._taken = self._made = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._at == len(self._input):
                self._input, self._at = memoryview(self._file.read(_READ_AHEAD)), 0
            if not self._input:
                if self._in_frame:
                    raise DamagedZstd("cut off")
                return 0
            self._decompress()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self) -> None:
        piece = self._input[self._at : self._at + _PIECE]
        try:
            self._ready = memoryview(self._frame.decompress(piece))
        except self._error as error:
            raise DamagedZstd(f"damaged or not zstd ({error})") from None
        used = len(piece) - len(self._frame.unused_data)
        self._at += used
        self._taken += used
        self._made += len(self._ready)
        self._in_frame = not self._frame.eof
        if self._frame.eof:
            self._frame = self._decompressor.decompressobj()
        if self._bomb_limit and self._made > max(_ALWAYS_ALLOWED, MOST_TIMES_LARGER * self._taken):
            raise DamagedZstd(f"more than {MOST_TIMES_LARGER} times larger than its compressed bytes")
