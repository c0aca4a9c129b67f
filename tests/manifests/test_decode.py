"""Decoding: Pillow's pixels for sound files, a reject for every other one."""

from __future__ import annotations

import pickle
import random
import resource
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
from made_pictures import bombs, encode, exif_orientation, photo, png, png_chunk, samples
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from manifests.containers import Container, sniff
from manifests.decode import MAX_ASPECT, MAX_EDGE, Reject, RejectReason, decode
from manifests.errors import EnvironmentProblem
from manifests.exif import orientation_of

SAMPLES = samples()


def rejected(data: bytes, **options: int) -> Reject:
    with pytest.raises(Reject) as caught:
        decode(data, **options)
    assert "\n" not in caught.value.message
    return caught.value


def pillow(data: bytes) -> NDArray[np.uint8]:
    with Image.open(BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


@pytest.mark.parametrize("name", SAMPLES)
def test_every_kind_is_a_contiguous_writable_rgb_array(name: str) -> None:
    image = decode(SAMPLES[name])
    assert image.dtype == np.uint8
    assert image.shape in {(28, 40, 3), (40, 28, 3)}
    assert image.flags.c_contiguous
    assert image.flags.writeable


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [30, 90])
def test_colour_jpeg_is_bit_identical_to_pillow(subsampling: int, progressive: bool, quality: int) -> None:
    for width, height in ((1, 1), (16, 16), (33, 17), (67, 130)):
        picture = Image.fromarray(photo(width, height))
        data = encode(picture, "JPEG", subsampling=subsampling, progressive=progressive, quality=quality)
        assert np.array_equal(decode(data), pillow(data))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_grey_and_cmyk_jpeg_are_bit_identical_to_pillow(mode: str, progressive: bool) -> None:
    data = encode(Image.fromarray(photo()).convert(mode), "JPEG", progressive=progressive)
    assert np.array_equal(decode(data), pillow(data))


@pytest.mark.parametrize("name", ["jpeg 4:4:4", "jpeg rgb", "png L", "png 1", "bmp", "bmp P", "bmp 1", "tiff CMYK"])
def test_opaque_files_are_bit_identical_to_pillow(name: str) -> None:
    assert np.array_equal(decode(SAMPLES[name]), pillow(SAMPLES[name]))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_corrupt_middle_of_a_jpeg_is_a_reject(mode: str, progressive: bool) -> None:
    data = bytearray(encode(Image.fromarray(photo(200, 160)).convert(mode), "JPEG", progressive=progressive))
    middle = len(data) // 2
    data[middle : middle + 12] = b"\xff" * 12
    assert rejected(bytes(data)).reason is RejectReason.CORRUPT


def test_pillow_alone_would_show_a_damaged_picture() -> None:
    data = bytearray(encode(Image.fromarray(photo(200, 160)).convert("L"), "JPEG"))
    sound, middle = pillow(bytes(data)), len(data) // 2
    data[middle : middle + 12] = b"\xff" * 12
    assert not np.array_equal(pillow(bytes(data)), sound)
    assert rejected(bytes(data)).reason is RejectReason.CORRUPT


def _cut_reason(name: str) -> set[RejectReason]:
    return {RejectReason.TRUNCATED} if not name.startswith("tiff") else {RejectReason.TRUNCATED, RejectReason.CORRUPT}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow says that a TIFF's metadata is cut off
@pytest.mark.parametrize("name", SAMPLES)
def test_truncated_files_are_rejects(name: str) -> None:
    data = SAMPLES[name]
    if name == "gif animation":  # a cut second frame is none of our business
        data = data[: len(data) // 2]
    for length in (len(data) // 2, len(data) * 3 // 4, len(data) - 8):
        if name in ("tiff I;16", "tiff CMYK", "tiff RGBA", "tiff None", "gif animation", "tiff packbits"):
            length = min(length, len(data) // 2)
        assert rejected(data[:length]).reason in _cut_reason(name), (name, length)


def test_a_jpeg_without_its_last_bytes_is_truncated() -> None:
    assert rejected(SAMPLES["jpeg"][:-2]).reason is RejectReason.TRUNCATED


@pytest.mark.parametrize("name", SAMPLES)
def test_bytes_after_the_end_are_ignored(name: str) -> None:
    assert np.array_equal(decode(SAMPLES[name] + b"<html>" * 100), decode(SAMPLES[name]))


def test_what_is_not_an_image() -> None:
    assert rejected(b"").reason is RejectReason.EMPTY
    page = rejected(b"<!DOCTYPE html><html><body>404</body></html>")
    assert page.reason is RejectReason.NOT_AN_IMAGE
    assert "web page" in page.message
    for data in (b"\0", b"\0" * 1000, b"RIFF\0\0\0\0WAVE", b"hello", bytes(range(256))):
        assert rejected(data).reason is RejectReason.NOT_AN_IMAGE


@pytest.mark.parametrize("head", [b"\0\0\0\x20ftypavif", b"\0\0\0\x18ftypheic", b"%!PS-Adobe", b"%PDF-1.7", b"8BPS"])
def test_other_formats_are_named_and_never_opened(head: bytes) -> None:
    assert rejected(head + b"\0" * 100).reason is RejectReason.UNSUPPORTED


def test_the_name_of_a_format_is_its_bytes() -> None:
    assert {name: sniff(data) for name, data in SAMPLES.items() if name in ("jpeg", "png", "webp")} == {
        "jpeg": Container.JPEG,
        "png": Container.PNG,
        "webp": Container.WEBP,
    }


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_by_its_header(name: str) -> None:
    data = bombs()[name]
    assert len(data) < 20_000
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rejected(data).reason is RejectReason.TOO_MANY_PIXELS
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB


def test_limits_of_size_and_shape() -> None:
    data = encode(Image.fromarray(photo(40, 28)), "PNG")
    assert decode(data, max_pixels=40 * 28).shape == (28, 40, 3)
    assert rejected(data, max_pixels=40 * 28 - 1).reason is RejectReason.TOO_MANY_PIXELS
    line = encode(Image.new("RGB", (MAX_ASPECT, 1)), "PNG")
    assert decode(line).shape == (1, MAX_ASPECT, 3)
    assert rejected(encode(Image.new("RGB", (1, MAX_ASPECT + 1)), "PNG")).reason is RejectReason.UNSUPPORTED
    assert rejected(encode(Image.new("1", (MAX_EDGE + 1, 100)), "PNG")).reason is RejectReason.TOO_MANY_PIXELS


def test_a_bomb_inside_the_pixels_of_a_png_is_not_inflated() -> None:
    stream = zlib.compress(b"\0" * 200_000_000, 9)
    start = time.monotonic()
    assert rejected(png(8, 8, 8, 2, b"", stream=stream)).reason is RejectReason.CORRUPT
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("name", [name for name in SAMPLES if not name.startswith(("webp", "tiff"))])
def test_pillows_global_limit_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = decode(SAMPLES[name])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode(SAMPLES[name]), expected)


@pytest.mark.parametrize("name", ["webp", "tiff None"])
def test_a_lowered_global_limit_stops_the_job_where_pillow_cannot_be_talked_out_of_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(EnvironmentProblem, match="MAX_IMAGE_PIXELS is 1"):
        decode(SAMPLES[name])


def test_pillows_leniency_for_truncated_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(EnvironmentProblem, match="set it to False"):
        decode(SAMPLES["png"])


# --- PNG: every mode, by hand, so that the expected pixels are known and not Pillow's ---


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


# --- the other formats ---


def test_the_first_frame_of_an_animation_is_the_picture() -> None:
    palette = Image.fromarray(photo()).quantize(16)
    assert np.array_equal(decode(SAMPLES["gif animation"]), np.array(palette.convert("RGB")))
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(decode(data), np.array(frames[0]))


def test_the_transparent_index_of_a_gif_is_white() -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.putdata([0, 1, 2, 1])
    red, white, blue = [200, 0, 0], [255, 255, 255], [0, 0, 200]
    assert decode(encode(image, "GIF", transparency=1)).tolist() == [[red, white, blue, white]]


def test_a_gif_frame_outside_its_screen_is_corrupt() -> None:
    data = bytearray(SAMPLES["gif"])
    data[6:10] = struct.pack("<HH", 10, 10)
    assert rejected(bytes(data)).reason is RejectReason.CORRUPT


def test_webp_alpha_goes_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    data = encode(image, "WEBP", lossless=True, exact=True)
    assert decode(data).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_sixteen_bits_keep_the_high_byte_in_both_byte_orders() -> None:
    values = np.array([[0x0000, 0x01FF, 0x7F00, 0xFFFF]], dtype=np.uint16)
    for data in (encode(Image.fromarray(values), "PNG"), encode(Image.fromarray(values), "TIFF")):
        assert decode(data)[0, :, 0].tolist() == [0, 1, 127, 255]
    big = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    assert decode(encode(big, "TIFF"))[0, :, 0].tolist() == [0, 1, 127, 255]


def test_pixels_without_a_range_and_rare_compressions_are_unsupported() -> None:
    rgb = Image.fromarray(photo())
    assert rejected(encode(rgb.convert("F"), "TIFF")).reason is RejectReason.UNSUPPORTED
    assert rejected(encode(rgb.convert("I"), "TIFF")).reason is RejectReason.UNSUPPORTED
    assert rejected(encode(rgb, "TIFF", compression="jpeg")).reason is RejectReason.UNSUPPORTED
    assert rejected(encode(rgb.convert("1"), "TIFF", compression="group4")).reason is RejectReason.UNSUPPORTED


def test_a_damaged_deflated_tiff_is_a_reject_though_libtiff_shows_it() -> None:
    data = bytearray(SAMPLES["tiff tiff_adobe_deflate"])
    data[400:408] = bytes(8)
    assert rejected(bytes(data)).reason is RejectReason.CORRUPT


def test_rare_sampling_factors_of_a_jpeg_are_unsupported() -> None:
    data = bytearray(SAMPLES["jpeg 4:4:4"])
    frame = data.index(b"\xff\xc0")
    for component in range(3):
        data[frame + 11 + 3 * component] = 0x22
    assert rejected(bytes(data)).reason is RejectReason.UNSUPPORTED


# --- orientation ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_applied_as_pillow_does(kind: str, orientation: int) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(photo(24, 16)), kind, exif=exif_orientation(orientation), **options)
    with Image.open(BytesIO(data)) as image:
        expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape[:2] == ((16, 24) if orientation < 5 else (24, 16))
    assert np.array_equal(decode(data), expected)


def _jpeg_with(segments: bytes) -> bytes:
    plain = encode(Image.fromarray(photo()), "JPEG")
    return plain[:2] + segments + plain[2:]


def _app1(body: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\1\0\0\0\x09\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\1\0" + b"\x12\x01\x02\0\1\0\0\0\x06\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\1\0" + b"\x12\x01\x03\0\2\0\0\0\x06\0\0\0",
        b"Exif\0\0" + b"\xff" * 65_000,
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x00" * 60_000,
    ],
)
def test_pathological_exif_is_ignored_without_a_warning(body: bytes) -> None:
    plain = decode(_jpeg_with(b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode(_jpeg_with(_app1(body))), plain)


def test_many_huge_segments_and_a_broken_profile_are_ignored() -> None:
    icc = b"ICC_PROFILE\0\x05\x02" + b"\xff" * 65_000
    segments = _app1(b"http://ns.adobe.com/xap/1.0/\0" + b"x" * 60_000) * 20
    segments += b"\xff\xe2" + struct.pack(">H", len(icc) + 2) + icc
    rotated = _jpeg_with(segments + _app1(exif_orientation(6)))
    assert np.array_equal(decode(rotated), np.rot90(decode(_jpeg_with(b"")), -1))


def test_exif_may_be_cut_anywhere() -> None:
    exif = exif_orientation(6)
    assert orientation_of(exif) == orientation_of(exif.removeprefix(b"Exif\0\0")) == 6
    assert {orientation_of(exif[:length]) for length in range(len(exif))} <= {1, 6}


# --- as a whole ---


def test_decoding_is_safe_in_threads() -> None:
    names = list(SAMPLES) * 8
    expected = {name: decode(data) for name, data in SAMPLES.items()}
    with ThreadPoolExecutor(8) as pool:
        for name, image in zip(names, pool.map(lambda name: decode(SAMPLES[name]), names), strict=True):
            assert np.array_equal(image, expected[name])


def test_a_reject_compares_by_value_and_crosses_processes() -> None:
    reject = rejected(b"")
    assert pickle.loads(pickle.dumps(reject)) == reject  # noqa: S301 - bytes of our own
    assert str(reject) == "empty: the file has no bytes"


def _mutate(data: bytes, other: bytes, chance: random.Random) -> bytes:
    mutant = bytearray(data)
    kind = chance.randrange(5)
    if kind == 0:
        for _ in range(chance.randint(1, 8)):
            mutant[chance.randrange(len(mutant))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        for _ in range(chance.randint(1, 4)):
            mutant[chance.randrange(min(160, len(mutant)))] = chance.choice([0, 1, 2, 3, 4, 8, 16, 127, 128, 255])
    elif kind == 2:
        del mutant[chance.randrange(len(mutant)) :]
    elif kind == 3:
        start, source = chance.randrange(len(mutant)), chance.randrange(len(mutant))
        mutant[start : start + chance.randint(0, 20)] = mutant[source : source + chance.randint(0, 20)]
    else:
        mutant[chance.randrange(len(mutant)) :] = other[chance.randrange(len(other)) :]
    return bytes(mutant)


def _mutate_png(data: bytes, chance: random.Random) -> bytes:
    """Change the bodies of a PNG's chunks under right checksums, so that the change reaches the decoder."""
    out, at = data[:8], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], bytearray(data[at + 8 : at + 8 + length])
        if kind == b"IDAT" and chance.random() < 0.5:
            body = bytearray(zlib.decompress(body))
        if body and chance.random() < 0.5:
            body[chance.randrange(len(body))] = chance.choice([0, 1, 2, 3, 4, 6, 16, 255])
        if kind == b"IDAT" and len(body) > length:
            body = bytearray(zlib.compress(body[: chance.randint(1, 2 * len(body))]))
        out += png_chunk(kind, bytes(body))
        at += 12 + length
    return out


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow says that a TIFF's metadata is damaged
def test_hostile_bytes_end_as_pixels_or_as_a_reject() -> None:
    chance = random.Random(20_250_601)
    files = list(SAMPLES.values())
    pngs = [data for data in files if data.startswith(b"\x89PNG")]
    outcomes: dict[str, int] = {}
    messages: list[str] = []
    for case in range(6_000):
        if case % 5:
            data = _mutate(chance.choice(files), chance.choice(files), chance)
        else:
            data = _mutate_png(chance.choice(pngs), chance)
        try:
            image = decode(data)
        except Reject as reject:
            outcome = str(reject.reason)
            messages.append(reject.message)
        else:
            outcome = "ok"
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            assert image.flags.c_contiguous
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert all(message and "\n" not in message for message in messages)
    assert min(outcomes.get(name, 0) for name in ("ok", "truncated", "corrupt", "not_an_image")) > 50, outcomes
