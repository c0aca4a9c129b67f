"""Encoded image bytes become oriented RGB pixels, or a reject: never a damaged picture, never a warning.

The arithmetic is Pillow's. A grey, YCbCr or RGB JPEG goes through TurboJPEG instead, which gives the same pixels
bit for bit and, unlike Pillow, can be strict: it refuses a file with damaged bytes in the middle. The whole policy
is the table in `docs/images.md`; `POLICY` is the same in words that go into every fingerprint.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from manifests import containers
from manifests.containers import Container
from manifests.errors import EnvironmentProblem
from manifests.exif import orientation_of, upright
from manifests.rejects import Reject, RejectReason

__all__ = ["DEFAULT_MAX_PIXELS", "MAX_ASPECT", "MAX_EDGE", "POLICY", "Reject", "RejectReason", "decode"]

DEFAULT_MAX_PIXELS = 89_478_485
"""Width x height above which an image is refused before it is decoded: a quarter GiB of RGB, Pillow's own limit."""

MAX_EDGE = 65_535
"""Longest edge that is decoded, the limit of JPEG itself."""

MAX_ASPECT = 1_000
"""Longer edge over shorter edge above which an image is refused: its views would show a line."""

# Limits decide whether an image is a reject, never what its codes are, so they are not in here: raising
# max_pixels to admit a few more images must not make the codes of all the others stale.
POLICY: dict[str, str | int] = {
    "version": 1,
    "alpha": "over white",
    "animation": "first frame",
    "cmyk": "pillow",
    "exif": "orientation applied",
    "grey": "repeated",
    "icc": "ignored",
    "jpeg": "strict",
    "palette": "expanded",
    "sixteen_bit": "high byte",
}

# What decoders raise for hostile bytes, found by mutating small files of every format (two million cases; a few
# thousand are repeated by tests/manifests/test_decode.py). OSError: Pillow's C decoders. SyntaxError: its readers, for
# headers that make no sense. ValueError: TurboJPEG, and sizes, offsets and modes that cannot be. TypeError and
# OverflowError: TIFF tags of the wrong type, or beyond a C integer. EOFError: documented by Pillow for a WebP without a
# frame. RuntimeError (CUDA) and MemoryError (the machine) say nothing about the image and are not in here.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, OverflowError, EOFError)

_OPAQUE_MODES = frozenset({"1", "L", "RGB", "RGBX", "CMYK", "YCbCr"})
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16L", "I;16B"})
# TIFF compressions whose damage is noticed (by LZW's and zlib's own checks) or that have none.
_TIFF_COMPRESSIONS = frozenset({"raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"})


def decode(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode one image by the policy of `docs/images.md`.

    data: the bytes of a JPEG, PNG, GIF, WebP, BMP or TIFF file, whatever it is called; bytes after its end are ignored.
    Returns a contiguous, writable uint8 (H, W, 3): RGB, upright. Raises Reject(empty | not_an_image | truncated |
    corrupt | too_many_pixels | unsupported). The size in the header is judged before pixels are allocated.
    Safe to call from many threads: nothing global is changed, and the work is done without the interpreter lock.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise EnvironmentProblem(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is true in this process and would turn damaged files into damaged "
            "pictures; set it to False"
        )
    container = containers.sniff(data)
    try:
        if container is Container.JPEG:
            pixels, orientation = _jpeg(data, max_pixels)
        elif container is Container.PNG:
            pixels, orientation = _png(data, max_pixels)
        elif container is Container.GIF:
            pixels, orientation = _gif(data, max_pixels)
        elif container is Container.WEBP:
            pixels, orientation = _webp(data, max_pixels)
        elif container is Container.BMP:
            pixels, orientation = _bmp(data, max_pixels)
        else:
            pixels, orientation = _tiff(data, max_pixels)
    except Image.DecompressionBombError:
        # Our own limit let it pass; Pillow's, which any code in the process may have changed, did not.
        raise EnvironmentProblem(
            f"PIL.Image.MAX_IMAGE_PIXELS is {Image.MAX_IMAGE_PIXELS} in this process and stops an image that "
            f"max_pixels = {max_pixels} allows; set it to None"
        ) from None
    except _DAMAGE as error:
        raise _reject_of(container, error) from error
    return upright(pixels, orientation)


def _reject_of(container: Container, error: Exception) -> Reject:
    words = " ".join(str(error).split())[:200] or type(error).__name__
    if "truncated" in words.lower():
        return Reject(RejectReason.TRUNCATED, f"the {container} ends early ({words})")
    return Reject(RejectReason.CORRUPT, f"the {container} is damaged ({words})")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise Reject(RejectReason.CORRUPT, f"the header says {width} x {height} pixels")
    if width * height > max_pixels:
        raise Reject(RejectReason.TOO_MANY_PIXELS, f"{width} x {height} pixels are more than max_pixels = {max_pixels}")
    if max(width, height) > MAX_EDGE:
        raise Reject(RejectReason.TOO_MANY_PIXELS, f"an edge of {width} x {height} pixels is longer than {MAX_EDGE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        message = f"one edge of {width} x {height} pixels is more than {MAX_ASPECT} times the other"
        raise Reject(RejectReason.UNSUPPORTED, message)


def _jpeg(data: bytes, max_pixels: int) -> tuple[NDArray[np.uint8], int]:
    jpeg = containers.walk_jpeg(data)
    _check_size(jpeg.width, jpeg.height, max_pixels)
    orientation = orientation_of(jpeg.exif)
    try:
        if jpeg.components != 4:
            return simplejpeg.decode_jpeg(jpeg.minimal, colorspace="RGB"), orientation
        simplejpeg.decode_jpeg(jpeg.minimal, colorspace="CMYK")  # for its strictness; the conversion to RGB is Pillow's
    except ValueError as error:
        if b"\xff\xd9" not in jpeg.minimal:  # however the decoder words it, the end marker is not there
            raise Reject(RejectReason.TRUNCATED, f"the JPEG ends early ({error})") from None
        if "subsampling" not in str(error):
            raise
        # Pillow would decode it, but could not tell whether it is damaged.
        message = "the JPEG has sampling factors that the strict decoder has no name for; convert it"
        raise Reject(RejectReason.UNSUPPORTED, message) from None
    return _rgb(JpegImagePlugin.JpegImageFile(BytesIO(jpeg.minimal))), orientation


def _png(data: bytes, max_pixels: int) -> tuple[NDArray[np.uint8], int]:
    png = containers.walk_png(data)
    _check_size(png.width, png.height, max_pixels)
    containers.check_png_pixels(png)
    image = PngImagePlugin.PngImageFile(BytesIO(png.minimal))
    pixels = _rgb(image)
    if png.colour_key is not None:
        pixels[_keyed(np.asarray(image), png.colour_key, png.bit_depth)] = 255
    return pixels, orientation_of(png.exif)


def _keyed(stored: NDArray[np.generic], key: tuple[int, ...], bit_depth: int) -> NDArray[np.bool_]:
    """Bool (H, W): the pixels of a grey or RGB PNG that equal its one transparent colour.

    stored: the picture as Pillow holds it: bool (1 bit), uint8 scaled to 0..255 (2 to 8 bits), uint16 (grey of 16
    bits), or uint8 (H, W, 3), which for 16-bit RGB is the high byte, so that such a key is compared by high bytes.
    """
    if bit_depth == 1:
        return np.asarray(stored, dtype=np.bool_) == bool(key[0] & 1)
    if stored.ndim == 2:
        scale = 1 if bit_depth == 16 else 255 // (2**bit_depth - 1)
        return np.asarray(stored == (key[0] & 2**bit_depth - 1) * scale)
    return np.asarray((stored == [sample >> 8 if bit_depth == 16 else sample & 255 for sample in key]).all(axis=-1))


def _gif(data: bytes, max_pixels: int) -> tuple[NDArray[np.uint8], int]:
    gif = containers.walk_gif(data)
    _check_size(gif.width, gif.height, max_pixels)
    return _rgb(GifImagePlugin.GifImageFile(BytesIO(gif.minimal))), 1


def _webp(data: bytes, max_pixels: int) -> tuple[NDArray[np.uint8], int]:
    _check_size(*containers.webp_size(data), max_pixels)
    image = WebPImagePlugin.WebPImageFile(BytesIO(data))
    exif = image.info.get("exif", b"")
    return _rgb(image), orientation_of(exif)


def _bmp(data: bytes, max_pixels: int) -> tuple[NDArray[np.uint8], int]:
    image = BmpImagePlugin.BmpImageFile(BytesIO(data))
    _check_size(*image.size, max_pixels)
    if any(tile[0] != "raw" for tile in image.tile):
        raise Reject(RejectReason.UNSUPPORTED, "run-length encoded BMP is not decoded; convert it to PNG")
    return _rgb(image), 1


def _tiff(data: bytes, max_pixels: int) -> tuple[NDArray[np.uint8], int]:
    image = TiffImagePlugin.TiffImageFile(BytesIO(data))
    _check_size(*image.size, max_pixels)
    compression = image.info.get("compression")
    if compression not in _TIFF_COMPRESSIONS:
        raise Reject(RejectReason.UNSUPPORTED, f"TIFF with {compression} compression is not decoded; convert it to PNG")
    if "deflate" in compression:
        tags = image.tag_v2
        offsets, counts = (tags.get(a) or tags.get(b) or () for a, b in ((273, 324), (279, 325)))
        containers.check_deflated_strips(data, offsets, counts, limit=16 * image.width * image.height + 2**20)
    return _rgb(image), 1  # Pillow turns a TIFF itself while it loads


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels of a Pillow image as uint8 (H, W, 3): high byte of 16 bits, alpha over white. Reject(unsupported)."""
    image.load()
    if image.mode in _SIXTEEN_BIT_MODES:
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    has_key = "transparency" in image.info and image.mode in ("P", "L")
    if image.mode in _ALPHA_MODES or has_key:
        rgba = image.convert("RGBA")
        over = Image.new("RGB", rgba.size, (255, 255, 255))
        over.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        return np.array(over)
    if image.mode == "P" or image.mode in _OPAQUE_MODES:
        return np.array(image.convert("RGB"))
    message = f"pixels of Pillow mode {image.mode!r} have no range that says what white is; convert them to 8 bits"
    raise Reject(RejectReason.UNSUPPORTED, message)
