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

import numpy as np
import pytest
from decoded import SAMPLES, pillow, rejected
from made_pictures import bombs, encode, photo, png, png_chunk
from PIL import Image, ImageFile

from manifests.containers import Container, sniff
from manifests.decode import MAX_ASPECT, MAX_EDGE, Reject, RejectReason, decode
from manifests.errors import EnvironmentProblem


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
