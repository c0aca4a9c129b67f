"""Small documents on disk: zstd frames that notice damage, and the first thing wrong with a document in one line."""

from __future__ import annotations

import zstandard
from pydantic import ValidationError


def compress(data: bytes) -> bytes:
    """A zstd frame with its size and a checksum, so that damage is noticed; deterministic."""
    return zstandard.ZstdCompressor(level=3, write_checksum=True, write_content_size=True).compress(data)


def decompress(frame: bytes, *, limit: int) -> bytes:
    """The content of one zstd frame of at most `limit` bytes; `zstandard.ZstdError` otherwise."""
    size = zstandard.frame_content_size(frame)
    if size < 0 or size > limit:
        raise zstandard.ZstdError(f"the frame says that it holds {size} bytes, allowed are 0 to {limit}")
    return zstandard.ZstdDecompressor().decompress(frame, max_output_size=limit, allow_extra_data=False)


def first_problem(error: Exception) -> str:
    """The first problem of a validation error, or another error's text, on one line."""
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        return f"{where}: {problem['msg']}" if where else problem["msg"]
    return " ".join(str(error).split())
