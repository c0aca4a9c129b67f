"""Walks over image files without decoding them: what kind, how large, is every byte of the picture there.

Pillow is lenient in places (a PNG whose data ends early becomes a picture with black rows), and every decoder reads
metadata that nobody asked for and stumbles over it (profiles, text, thumbnails). The walks here check what the
decoders do not, and cut a JPEG, PNG or GIF down to the bytes that make its first picture, so that no other byte of
the file can matter.

Sources: ITU T.81 annex B (JPEG), PNG specification (third edition) sections 5, 11 and 13, GIF89a specification,
RFC 9649 (WebP).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from manifests.rejects import Reject, RejectReason


class Container(StrEnum):
    """The file formats that are decoded; every other one is a reject."""

    JPEG = "JPEG"
    PNG = "PNG"
    GIF = "GIF"
    WEBP = "WebP"
    BMP = "BMP"
    TIFF = "TIFF"


# First bytes -> format. Names of files and media types are never looked at: many a PNG is called .jpg.
_MAGIC: tuple[tuple[bytes, Container], ...] = (
    (b"\xff\xd8\xff", Container.JPEG),
    (b"\x89PNG\r\n\x1a\n", Container.PNG),
    (b"GIF87a", Container.GIF),
    (b"GIF89a", Container.GIF),
    (b"BM", Container.BMP),
    (b"II*\0", Container.TIFF),
    (b"MM\0*", Container.TIFF),
)
# Formats that people do have, so that their reject can name them.
_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"II+\0", "BigTIFF"),
    (b"MM\0+", "BigTIFF"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"P6", "PPM"),
    (b"P5", "PGM"),
    (b"\0\0\1\0", "icon"),
)


def sniff(data: bytes) -> Container:
    """The container of `data` by its first bytes; Reject(empty | not_an_image | unsupported)."""
    if not data:
        raise Reject(RejectReason.EMPTY, "the file has no bytes")
    for magic, container in _MAGIC:
        if data.startswith(magic):
            return container
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Container.WEBP
    if data[4:8] == b"ftyp":
        name = "AVIF" if data[8:11] == b"avi" else "HEIF or video"
        raise Reject(RejectReason.UNSUPPORTED, f"{name} is not decoded; convert it to PNG or JPEG")
    for magic, name in _REFUSED:
        if data.startswith(magic):
            raise Reject(RejectReason.UNSUPPORTED, f"{name} is not decoded; convert it to PNG or JPEG")
    text = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<svg")):
        raise Reject(RejectReason.NOT_AN_IMAGE, "the file is a web page or XML, not an image; download it again")
    raise Reject(RejectReason.NOT_AN_IMAGE, f"the file starts with {data[:8].hex(' ')}, which no image format does")


@dataclass(frozen=True, slots=True)
class JpegFile:
    """The frame header of a JPEG, and the file without what is not needed for its pixels."""

    width: int
    height: int
    components: int
    minimal: bytes
    exif: bytes
    """The body of the first EXIF segment, b"" when there is none."""


# Kept: JFIF (APP0) and Adobe (APP14), which say what the colours mean. Dropped: the other APPn, and comments.
_JPEG_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def walk_jpeg(data: bytes) -> JpegFile:
    """Read the segments of a JPEG up to its pixels. Reject(truncated | corrupt | unsupported)."""
    kept: list[bytes] = [data[:2]]
    frame: tuple[int, int, int] | None = None
    exif = b""
    at = 2
    while True:
        if at + 4 > len(data):
            raise Reject(RejectReason.TRUNCATED, "the JPEG ends before its pixels")
        if data[at] != 0xFF:
            raise Reject(RejectReason.CORRUPT, f"byte {at} of the JPEG is no marker where one has to be")
        marker = data[at + 1]
        if marker == 0xFF:  # padding before a marker
            at += 1
            continue
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at : at + length]
        if marker == 0xDA:  # the pixels, to the end of the file
            kept.append(data[at:])
            break
        if len(segment) < length:
            raise Reject(RejectReason.TRUNCATED, "the JPEG ends before its pixels")
        if length < 4 or marker <= 0x01 or 0xD0 <= marker <= 0xD9:
            raise Reject(RejectReason.CORRUPT, f"the JPEG has the marker {marker:#04x} before its pixels")
        if marker in _JPEG_FRAMES:
            if length < 10:
                raise Reject(RejectReason.CORRUPT, "the frame header of the JPEG is too short")
            precision, height, width, components = struct.unpack_from(">BHHB", segment, 4)
            if marker not in (0xC0, 0xC1, 0xC2) or precision != 8 or components not in (1, 3, 4):
                kind = f"process {marker:#04x}, {precision} bits, {components} components"
                raise Reject(RejectReason.UNSUPPORTED, f"the JPEG is of a rare kind ({kind}); convert it")
            frame = width, height, components
        if marker == 0xE1 and not exif and segment[4:10] == b"Exif\0\0":
            exif = segment[4:]
        if marker not in _JPEG_METADATA:
            kept.append(segment)
        at += length
    if frame is None:
        raise Reject(RejectReason.CORRUPT, "the JPEG has pixels but no frame header")
    return JpegFile(*frame, b"".join(kept), exif)


@dataclass(frozen=True, slots=True)
class PngFile:
    """A whole PNG whose checksums hold, and the smallest PNG with the same picture."""

    width: int
    height: int
    bit_depth: int
    minimal: bytes
    colour_key: tuple[int, ...] | None
    """tRNS of a grey or RGB file: the one transparent colour, as samples of `bit_depth` bits."""
    exif: bytes


_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, body) of every chunk up to IEND, each checksum verified; bytes after IEND are ignored."""
    at = 8
    while True:
        if at + 12 > len(data):
            raise Reject(RejectReason.TRUNCATED, "the PNG ends before its IEND chunk")
        (length,) = struct.unpack_from(">I", data, at)
        kind = data[at + 4 : at + 8]
        if at + 12 + length > len(data):
            raise Reject(RejectReason.TRUNCATED, f"the PNG ends inside its {kind.decode('latin-1')!r} chunk")
        (stored,) = struct.unpack_from(">I", data, at + 8 + length)
        if zlib.crc32(memoryview(data)[at + 4 : at + 8 + length]) != stored:
            raise Reject(RejectReason.CORRUPT, f"the checksum of the PNG's {kind.decode('latin-1')!r} chunk is wrong")
        if kind == b"IEND":
            return
        yield kind, data[at + 8 : at + 8 + length]
        at += 12 + length


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def walk_png(data: bytes) -> PngFile:
    """Check a PNG as far as possible without inflating it. Reject(truncated | corrupt | unsupported)."""
    parts: dict[bytes, bytes] = {}
    pixels: list[bytes] = []
    for kind, body in _png_chunks(data):
        if kind == b"IDAT":
            pixels.append(body)
        elif kind in (b"IHDR", b"PLTE", b"tRNS", b"eXIf"):
            parts.setdefault(kind, body)
        elif not kind[0] & 0x20:  # a critical chunk of an extension: the picture cannot be shown without it
            raise Reject(RejectReason.UNSUPPORTED, f"the PNG needs the unknown chunk {kind.decode('latin-1')!r}")
    header = parts.get(b"IHDR", b"")
    if len(header) != 13 or not pixels:
        raise Reject(RejectReason.CORRUPT, "the PNG has no header or no pixels")
    width, height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", header)
    if not width or not height or depth not in _PNG_DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise Reject(RejectReason.CORRUPT, "the header of the PNG is not a valid one")
    palette, transparency = parts.get(b"PLTE", b""), parts.get(b"tRNS", b"")
    if colour == 3 and (not 3 <= len(palette) <= 768 or len(palette) % 3):
        raise Reject(RejectReason.CORRUPT, "the palette of the PNG is missing or has a wrong length")
    key: tuple[int, ...] | None = None
    if transparency and colour in (0, 2):
        if len(transparency) != 2 * _PNG_CHANNELS[colour]:
            raise Reject(RejectReason.CORRUPT, "the tRNS chunk of the PNG has a wrong length")
        key = struct.unpack(f">{_PNG_CHANNELS[colour]}H", transparency)
    kept = _png_chunk(b"IHDR", header)
    if colour == 3:
        kept += _png_chunk(b"PLTE", palette)
        if transparency:
            kept += _png_chunk(b"tRNS", transparency[: len(palette) // 3])
    stream = b"".join(pixels)
    minimal = b"\x89PNG\r\n\x1a\n" + kept + _png_chunk(b"IDAT", stream) + _png_chunk(b"IEND", b"")
    return PngFile(width, height, depth, minimal, key, parts.get(b"eXIf", b""))


def check_png_pixels(png: PngFile) -> None:
    """Inflate the pixels once and count them. Reject(truncated | corrupt) unless every row is there.

    Costs a second inflation, a fifth of decoding, and is the only way to see a stream that ends early.
    """
    colour, interlace = png.minimal[25], png.minimal[28]
    bits = png.bit_depth * _PNG_CHANNELS[colour]
    # Adam7: (first column, first row, column step, row step) of the seven passes.
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    wanted = 0
    for x, y, across, down in passes if interlace else [(0, 0, 1, 1)]:
        columns, rows = -(-(png.width - x) // across), -(-(png.height - y) // down)
        if columns > 0 and rows > 0:
            wanted += rows * (1 + (columns * bits + 7) // 8)
    start = png.minimal.index(b"IDAT") + 4
    if inflated_size(png.minimal[start:-16], limit=wanted + 65536) < wanted:
        raise Reject(RejectReason.TRUNCATED, "the pixels of the PNG end before its last row")


def inflated_size(stream: bytes, limit: int) -> int:
    """Length of a zlib stream's content, its checksum verified, in bounded memory.

    Reject(truncated) when the stream does not end, Reject(corrupt) when it is damaged or inflates beyond `limit`.
    """
    inflater = zlib.decompressobj()
    size = 0
    try:
        for at in range(0, len(stream), 65536):
            size += len(inflater.decompress(stream[at : at + 65536]))
            if size > limit:
                raise Reject(RejectReason.CORRUPT, "the compressed pixels inflate to more than the picture holds")
            if inflater.eof:
                return size
    except zlib.error as error:
        raise Reject(RejectReason.CORRUPT, f"the compressed pixels are damaged ({error})") from None
    raise Reject(RejectReason.TRUNCATED, "the compressed pixels end early")


@dataclass(frozen=True, slots=True)
class GifFile:
    """The first picture of a GIF, and the smallest GIF that shows it."""

    width: int
    height: int
    minimal: bytes


def _gif_blocks(data: bytes, at: int) -> int:
    """The offset after the data sub-blocks that start at `at`."""
    while data[at]:
        at += data[at] + 1
        if at >= len(data):
            break
    return at + 1


def walk_gif(data: bytes) -> GifFile:
    """Find the first picture of a GIF. Reject(truncated | corrupt).

    The screen is the picture; a frame that reaches outside it is corrupt. Everything after the first frame is ignored.
    """
    try:
        width, height, flags = struct.unpack_from("<HHB", data, 6)
        at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        screen, control = data[:at], b""
        while data[at] == 0x21:
            after = _gif_blocks(data, at + 2)
            if data[at + 1] == 0xF9 and data[at + 2] == 4:
                # Of the graphic control only the transparent index says how one picture looks.
                control = b"\x21\xf9\x04" + bytes([data[at + 3] & 1]) + b"\0\0" + data[at + 6 : at + 7] + b"\0"
            at = after
        if data[at] != 0x2C:
            raise Reject(RejectReason.CORRUPT, "the GIF holds no picture where one has to be")
        left, top, across, down, local = struct.unpack_from("<HHHHB", data, at + 1)
        pixels = at + 10 + (3 << (local & 7) + 1 if local & 0x80 else 0)
        after = _gif_blocks(data, pixels + 1)
    except (IndexError, struct.error):
        raise Reject(RejectReason.TRUNCATED, "the GIF ends before its first picture does") from None
    if not across or not down or left + across > width or top + down > height:
        raise Reject(RejectReason.CORRUPT, "the first picture of the GIF is empty or reaches outside its screen")
    return GifFile(width, height, screen + control + data[at:after] + b"\0;")


def webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) that the first chunk of a WebP announces. Reject(truncated | corrupt)."""
    if len(data) < 30:
        raise Reject(RejectReason.TRUNCATED, "the WebP ends inside its header")
    if len(data) < 8 + struct.unpack_from("<I", data, 4)[0]:
        raise Reject(RejectReason.TRUNCATED, "the WebP is shorter than its header says")
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise Reject(RejectReason.CORRUPT, "the WebP does not start with a picture")


def check_deflated_strips(data: bytes, offsets: Iterable[int], counts: Iterable[int], limit: int) -> None:
    """Verify every zlib strip or tile of a TIFF, which libtiff leaves unfinished. Reject(truncated | corrupt)."""
    for offset, count in zip(offsets, counts, strict=False):
        limit -= inflated_size(data[offset : offset + count], limit)
