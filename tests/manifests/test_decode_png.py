"""PNG: every mode, by hand, so that the expected pixels are known and not Pillow's."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from decoded import SAMPLES, pillow, rejected
from made_pictures import png, png_chunk

from manifests.decode import RejectReason, decode


def test_png_grey_of_every_depth() -> None:
    for depth, row, values in (
        (1, b"\x50", [0, 255, 0, 255]),
        (2, b"\x1b", [0, 85, 170, 255]),
        (4, b"\x03\xcf", [0, 51, 204, 255]),
        (8, b"\x00\x01\xfe\xff", [0, 1, 254, 255]),
        (16, b"\x00\xff\x01\x00\xfe\xff\xff\xff", [0, 1, 254, 255]),
    ):
        image = decode(png(4, 2, depth, 0, (b"\0" + row) * 2))
        assert image.tolist() == [[[value] * 3 for value in values]] * 2, depth


def test_png_grey_colour_key_of_every_depth_is_white() -> None:
    for depth, row, key, values in (
        (1, b"\x50", 0, [255, 255, 255, 255]),
        (2, b"\x1b", 1, [0, 255, 170, 255]),
        (4, b"\x03\xcf", 3, [0, 255, 204, 255]),
        (8, b"\x00\x01\xfe\xff", 1, [0, 255, 254, 255]),
        (16, b"\x00\xff\x01\x00\xfe\xff\xff\xff", 0x0100, [0, 255, 254, 255]),
    ):
        image = decode(png(4, 1, depth, 0, b"\0" + row, before=png_chunk(b"tRNS", struct.pack(">H", key))))
        assert image[0, :, 0].tolist() == values, depth


def test_png_rgb_of_both_depths_with_and_without_colour_key() -> None:
    wide = b"\0" + struct.pack(">6H", 0x1011, 0x2022, 0x3033, 0x40FF, 0x50FF, 0x60FF)
    narrow = b"\0" + bytes([0x10, 0x20, 0x30, 0x40, 0x50, 0x60])
    expected = [[[0x10, 0x20, 0x30], [0x40, 0x50, 0x60]]]
    assert decode(png(2, 1, 16, 2, wide)).tolist() == decode(png(2, 1, 8, 2, narrow)).tolist() == expected
    expected[0][0] = [255, 255, 255]
    key = png_chunk(b"tRNS", struct.pack(">3H", 0x1011, 0x2022, 0x3033))
    assert decode(png(2, 1, 16, 2, wide, before=key)).tolist() == expected
    key = png_chunk(b"tRNS", struct.pack(">3H", 0x10, 0x20, 0x30))
    assert decode(png(2, 1, 8, 2, narrow, before=key)).tolist() == expected


def test_png_alpha_goes_over_white() -> None:
    assert decode(png(3, 1, 8, 4, b"\0" + bytes([100, 255, 100, 0, 0, 51]))).tolist() == [
        [[100] * 3, [255] * 3, [204] * 3]
    ]
    assert decode(png(2, 1, 8, 6, b"\0" + bytes([10, 20, 30, 255, 10, 20, 30, 0]))).tolist() == [
        [[10, 20, 30], [255, 255, 255]]
    ]
    assert decode(png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 0x1000, 0x2000, 0x3000, 0xFF00))).tolist() == [
        [[0x10, 0x20, 0x30]]
    ]
    assert decode(png(1, 1, 16, 4, b"\0" + struct.pack(">2H", 0x1000, 0))).tolist() == [[[255] * 3]]


def test_png_palette_with_partial_alpha() -> None:
    palette = png_chunk(b"PLTE", bytes([200, 0, 0, 0, 200, 0, 0, 0, 0]))
    rows = b"\0" + bytes([0, 1, 2])
    assert decode(png(3, 1, 8, 3, rows, before=palette)).tolist() == [[[200, 0, 0], [0, 200, 0], [0, 0, 0]]]
    clear = palette + png_chunk(b"tRNS", bytes([255, 0, 51]))
    assert decode(png(3, 1, 8, 3, rows, before=clear)).tolist() == [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert rejected(png(3, 1, 8, 3, rows)).reason is RejectReason.CORRUPT


def test_png_interlaced_files_are_counted_right() -> None:
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 1)
    one = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    one += png_chunk(b"IDAT", zlib.compress(b"\0\x07")) + png_chunk(b"IEND", b"")
    assert decode(one).tolist() == [[[7, 7, 7]]]
    header = struct.pack(">IIBBBBB", 5, 5, 8, 0, 0, 0, 1)
    # Passes of a 5 x 5 picture have (columns, rows) 1x1, 1x1, 2x1, 1x2, 3x1, 2x3, 5x2.
    rows = b"".join(
        (b"\0" + b"\x09" * columns) * n for columns, n in ((1, 1), (1, 1), (2, 1), (1, 2), (3, 1), (2, 3), (5, 2))
    )
    head = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    whole = head + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    assert np.array_equal(decode(whole), np.full((5, 5, 3), 9))
    short = head + png_chunk(b"IDAT", zlib.compress(rows[:-1])) + png_chunk(b"IEND", b"")
    assert rejected(short).reason is RejectReason.TRUNCATED


def test_png_whose_pixels_end_early_is_truncated_though_pillow_shows_black_rows() -> None:
    short = png(4, 4, 8, 2, (b"\0" + b"\x80" * 12) * 2)
    assert pillow(short)[-1].max() == 0
    assert rejected(short).reason is RejectReason.TRUNCATED


def test_png_checksums_are_verified() -> None:
    good = SAMPLES["png L"]
    for kind in (b"IHDR", b"IDAT"):
        data = bytearray(good)
        at = data.index(kind)
        (length,) = struct.unpack_from(">I", data, at - 4)
        data[at + 4 + length] ^= 1
        assert "checksum" in rejected(bytes(data)).message
    stream = bytearray(zlib.compress(b"\0\x01\x02" * 2))
    stream[-1] ^= 1  # zlib's own checksum, under a chunk checksum that holds
    assert rejected(png(2, 2, 8, 0, b"", stream=bytes(stream))).reason is RejectReason.CORRUPT


def test_png_metadata_of_any_size_and_kind_is_ignored() -> None:
    rows = b"\0\x05\x06"
    plain = decode(png(2, 1, 8, 0, rows))
    for chunk in (
        png_chunk(b"tEXt", b"key\0" + b"x" * 5_000_000),
        png_chunk(b"zTXt", b"key\0\0" + zlib.compress(b"x" * 100_000_000)),
        png_chunk(b"iTXt", b"\xff" * 100),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"\0" * 50_000_000)),
        png_chunk(b"iCCP", b"junk"),
        png_chunk(b"gAMA", b"\0"),
        png_chunk(b"acTL", struct.pack(">II", 3, 0)) + png_chunk(b"fcTL", b"\0" * 26),
        png_chunk(b"eXIf", b"\xff" * 1000),
    ):
        assert np.array_equal(decode(png(2, 1, 8, 0, rows, before=chunk)), plain)
    assert rejected(png(2, 1, 8, 0, rows, before=png_chunk(b"ABCD", b""))).reason is RejectReason.UNSUPPORTED
