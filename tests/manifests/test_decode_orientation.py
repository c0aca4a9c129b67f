"""Orientation, and metadata that is damaged or huge."""

from __future__ import annotations

import struct
import warnings
from io import BytesIO

import numpy as np
import pytest
from made_pictures import encode, exif_orientation, photo
from PIL import Image, ImageOps

from manifests.decode import decode
from manifests.exif import orientation_of


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
