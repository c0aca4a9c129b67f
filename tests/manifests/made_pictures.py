"""Small encoded files of every kind, made by hand or by Pillow, for the tests of decoding."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def photo(width: int = 40, height: int = 28, seed: int = 0) -> NDArray[np.uint8]:
    """Ramps with noise, uint8 (height, width, 3): compresses like a photograph."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(-25, 25, (height, width, 3))
    return np.clip(np.stack([x * 5, y * 7, 255 - x - y], axis=-1) + noise, 0, 255).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, *, before: bytes = b"", stream: bytes | None = None
) -> bytes:
    """A PNG from filtered rows, or from a compressed stream; `before` are chunks that stand before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(rows) if stream is None else stream
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    )


def samples() -> dict[str, bytes]:
    """One valid file of every kind that is decoded."""
    rgb = Image.fromarray(photo())
    grey = rgb.convert("L")
    palette = rgb.quantize(16)
    rgba = rgb.copy()
    rgba.putalpha(grey)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = exif_orientation(6)
    turned = rgb.rotate(90, expand=False)
    files = {
        "jpeg": encode(rgb, "JPEG", exif=exif),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg grey": encode(grey, "JPEG"),
        "jpeg cmyk": encode(rgb.convert("CMYK"), "JPEG", exif=exif),
        "jpeg 4:4:4": encode(rgb, "JPEG", subsampling=0),
        "jpeg rgb": encode(rgb, "JPEG", keep_rgb=True),
        "png": encode(rgb, "PNG", exif=exif),
        "png 1": encode(rgb.convert("1"), "PNG"),
        "png L": encode(grey, "PNG"),
        "png LA": encode(rgba.convert("LA"), "PNG"),
        "png P": encode(palette, "PNG", transparency=3),
        "png RGBA": encode(rgba, "PNG"),
        "png I;16": encode(sixteen, "PNG"),
        "gif": encode(palette, "GIF", transparency=2),
        "gif animation": encode(palette, "GIF", save_all=True, append_images=[palette.rotate(90)], disposal=2),
        "webp": encode(rgba, "WEBP", exif=exif),
        "webp lossless": encode(rgb, "WEBP", lossless=True),
        "webp animation": encode(rgb, "WEBP", save_all=True, append_images=[turned]),
        "bmp": encode(rgb, "BMP"),
        "bmp P": encode(palette, "BMP"),
        "bmp 1": encode(rgb.convert("1"), "BMP"),
        "tiff I;16": encode(sixteen, "TIFF"),
        "tiff CMYK": encode(rgb.convert("CMYK"), "TIFF"),
        "tiff RGBA": encode(rgba, "TIFF"),
    }
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        files[f"tiff {compression}"] = encode(rgb, "TIFF", compression=compression)
    return files


def bombs() -> dict[str, bytes]:
    """Tiny files whose headers announce at least 60,000 x 16,000 pixels."""
    jpeg = bytearray(encode(Image.fromarray(photo()), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    bmp = bytearray(encode(Image.fromarray(photo()), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    tiff = bytearray(encode(Image.fromarray(photo()), "TIFF"))
    (directory,) = struct.unpack_from("<I", tiff, 4)
    for at in range(directory + 2, directory + 26, 12):
        tag = struct.unpack_from("<H", tiff, at)[0]
        assert tag in (256, 257)
        struct.pack_into("<HII", tiff, at + 2, 4, 1, 60_000)
    gif = bytearray(encode(Image.fromarray(photo()).quantize(16), "GIF"))
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    lossless = bytearray(encode(Image.fromarray(photo()), "WEBP", lossless=True))
    lossless[21:25] = struct.pack("<I", 16_382 | 16_382 << 14)
    lossy = bytearray(encode(Image.fromarray(photo()), "WEBP"))
    lossy[26:30] = struct.pack("<HH", 16_383, 16_383)
    extended = bytearray(encode(Image.fromarray(photo()), "WEBP", exif=exif_orientation(1)))
    extended[24:30] = (2**24 - 2).to_bytes(3, "little") * 2
    return {
        "jpeg": bytes(jpeg),
        "png": png(60_000, 60_000, 8, 2, b"\0" * 180_001),
        "gif": bytes(gif),
        "webp lossless": bytes(lossless),
        "webp lossy": bytes(lossy),
        "webp extended": bytes(extended),
        "bmp": bytes(bmp),
        "tiff": bytes(tiff),
    }
