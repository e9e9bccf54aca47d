"""Decodes image bytes to uint8 RGB pixels by the fastest correct decoder, or raises with the reason.

    JPEG            simplejpeg (libjpeg-turbo, bit-identical to Pillow), scaled by 1/2, 1/4 or 1/8 in its DCT on request
    PNG, RGB 8 bit  OpenCV
    anything else   Pillow: alpha on white, CMYK, palettes, 16 bits, WebP, GIF, BMP, TIFF
EXIF orientation is applied; transparent pixels lie on white.
"""

import io
from contextlib import suppress
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.format.image_header import read_image_header
from data_pipeline.format.opaque import opaque

Pixels = NDArray[np.uint8]
_ORIENTATION = 0x0112
_EXIF_REACH = 65536
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # damage is recorded, not printed


class BadSample(Exception):
    """A sample that cannot be used: `reason` is one of a few words for counting, `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class DroppedSample(BadSample):
    """A sample that curation has left out: replaced as a bad one is, and neither counted nor recorded as bad."""


class Header(NamedTuple):
    """Size in pixels as it will be decoded, decoder, and EXIF orientation (1 to 8)."""

    width: int
    height: int
    decoder: str  # simplejpeg | opencv | pillow
    orientation: int = 1


def read_header(data: bytes, max_pixels: int) -> Header:
    """Reads an image's header. Raises BadSample: image_empty, not_an_image, image_truncated, too_many_pixels."""
    if not data:
        raise BadSample("image_empty", "the image member has no bytes")
    decoder = "pillow"
    if data[:3] == b"\xff\xd8\xff":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            decoder = "simplejpeg" if colours in ("YCbCr", "Gray", "RGB") else "pillow"
        except ValueError:
            height, width = _probed_size(data)
    else:
        height, width = _probed_size(data)
        if data[:4] == b"\x89PNG" and data[24:26] == b"\x08\x02" and b"tRNS" not in data[:1024]:  # 8 bits, RGB, opaque
            decoder = "opencv"
    if width * height > max_pixels:
        raise BadSample("too_many_pixels", f"{width} x {height} is over the limit of {max_pixels}")
    if b"Exif" not in data[:_EXIF_REACH] and b"eXIf" not in data[:_EXIF_REACH]:
        return Header(width, height, decoder)
    orientation = _orientation(data)
    if orientation >= 5:
        width, height = height, width
    return Header(width, height, decoder, orientation)


def decode(data: bytes, header: Header, reduce: int = 1) -> Pixels:
    """Decodes to uint8 RGB [H, W, 3]. `reduce` 2, 4 or 8 gives H / reduce x W / reduce, rounded up; see `can_reduce`.

    Raises BadSample: image_truncated, image_undecodable.
    """
    pixels = None
    if header.decoder == "simplejpeg":
        height, width = (header.height, header.width) if header.orientation < 5 else (header.width, header.height)
        small = dict(min_height=-(-height // reduce), min_width=-(-width // reduce), min_factor=2) if reduce > 1 else {}
        with suppress(ValueError):  # Pillow decides about damaged JPEGs: many faults are harmless
            pixels = simplejpeg.decode_jpeg(data, "RGB", **small)
    elif header.decoder == "opencv" and data[-8:-4] == b"IEND":
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        pixels = _pillow(data)
        if reduce > 1:
            pixels = np.asarray(Image.fromarray(pixels).reduce(reduce))
    return _upright(pixels, header.orientation)


def can_reduce(header: Header) -> bool:
    """Tells whether scaling inside the decoder saves work."""
    return header.decoder == "simplejpeg"


def _probed_size(data: bytes) -> tuple[int, int]:
    found = read_image_header(data)
    if found is None:
        if data[:3] == b"\xff\xd8\xff":
            raise BadSample("image_truncated", f"a JPEG of {len(data)} bytes that ends before its size")
        raise BadSample("not_an_image", f"starts with {data[:16]!r}")
    return found.height, found.width


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises many kinds on damaged metadata, which does not make the pixels bad
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undoes an EXIF orientation (TIFF 6.0, tag 274)."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _pillow(data: bytes) -> Pixels:
    """Decodes any image to opaque RGB, not yet upright."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            if file.mode == "F":
                levels = np.clip(np.asarray(file).astype(np.float64), 0, 255).round()
                return np.array(Image.fromarray(levels.astype(np.uint8)).convert("RGB"))
            return np.array(opaque(file))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError
        cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
        raise BadSample("image_truncated" if cut else "image_undecodable", f"{error}") from None
