"""Inputs that go wrong, each in its own way, with the reason its reject must have (None: it is a good picture)."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from made_jobs import picture
from PIL import Image

Expected = dict[str, str | None]


def make_bad_inputs(root: Path) -> Expected:
    """Write them below `root`; the keys are references that a source may hold."""
    root.mkdir(parents=True, exist_ok=True)
    jpeg = _large_jpeg()
    middle = len(jpeg) // 2
    files: dict[str, bytes] = {
        "good.png": picture(1),
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "corrupt.jpg": jpeg[:middle] + b"\xff\xc0\x00\x00" + jpeg[middle + 4 :],
        "page.jpg": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "empty.png": b"",
        "bomb.png": _png_header_only(60_000, 60_000),
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    for name, image in _odd_modes().items():
        image.save(root / name)
    outside = root.parent / "outside.png"
    outside.write_bytes(picture(2))
    (root / "link.png").symlink_to(outside)
    return {
        "good.png": None,
        "truncated.jpg": "truncated",
        "corrupt.jpg": "corrupt",
        "page.jpg": "not_an_image",
        "empty.png": "empty",
        "bomb.png": "too_many_pixels",
        "link.png": "outside_root",
        **dict.fromkeys(_odd_modes()),
    }


def _large_jpeg() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (200, 200, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _odd_modes() -> dict[str, Image.Image]:
    image = Image.open(io.BytesIO(picture(3)))
    return {
        "grey.png": image.convert("L"),
        "bilevel.png": image.convert("1"),
        "grey_alpha.png": image.convert("LA"),
        "alpha.png": image.convert("RGBA"),
        "palette.png": image.convert("P"),
        "sixteen_bit.png": Image.fromarray(np.linspace(0, 65535, 900).reshape(30, 30).astype(np.uint16)),
    }


def _png_header_only(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to hold gigapixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
