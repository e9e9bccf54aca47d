"""Decodes image bytes to uint8 RGB pixels by the fastest correct decoder, or raises with the reason.

    JPEG            simplejpeg (libjpeg-turbo, bit-identical to Pillow), scaled by 1/2, 1/4 or 1/8 in its DCT on request
    PNG, RGB 8 bit  OpenCV
    anything else   Pillow: alpha on white, CMYK, palettes, 16 bits, floats, WebP, GIF, BMP, TIFF, AVIF
The orientation is applied (`format.upright`); transparent pixels lie on white.
"""

import io
from contextlib import suppress
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.format.image_header import ImageHeader, read_image_header, too_many_scans
from data_pipeline.format.opaque import opaque
from data_pipeline.format.upright import orientation, turned_by_pillow, upright

Pixels = NDArray[np.uint8]
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
    turned: bool = False  # the decoder turns the pixels itself


def read_header(data: bytes, max_pixels: int) -> Header:
    """Reads an image's header. Raises BadSample: image_empty, not_an_image, image_truncated, too_many_pixels,
    too_many_scans."""
    if not data:
        raise BadSample("image_empty", "the image member has no bytes")
    decoder = "pillow"
    if data[:3] == b"\xff\xd8\xff":
        format = "jpeg"
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            decoder = "simplejpeg" if colours in ("YCbCr", "Gray", "RGB") else "pillow"
        except ValueError:
            _, width, height = _probed(data)
    else:
        format, width, height = _probed(data)
        if data[:4] == b"\x89PNG" and data[24:26] == b"\x08\x02" and b"tRNS" not in data[:1024]:  # 8 bits, RGB, opaque
            decoder = "opencv"
    if width * height > max_pixels:
        raise BadSample("too_many_pixels", f"{width} x {height} is over the limit of {max_pixels}")
    header = ImageHeader(format, width, height)
    if too_many_scans(data, header):
        raise BadSample("too_many_scans", "decoding this progressive JPEG takes many times what its size promises")
    turn = orientation(data, format)
    if turn >= 5:
        width, height = height, width
    return Header(width, height, decoder, turn, turned_by_pillow(format))


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
    return pixels if header.turned else upright(pixels, header.orientation)


def can_reduce(header: Header) -> bool:
    """Tells whether scaling inside the decoder saves work."""
    return header.decoder == "simplejpeg"


def _probed(data: bytes) -> ImageHeader:
    found = read_image_header(data)
    if found is None:
        if data[:3] == b"\xff\xd8\xff":
            raise BadSample("image_truncated", f"a JPEG of {len(data)} bytes that ends before its size")
        raise BadSample("not_an_image", f"starts with {data[:16]!r}")
    return found


def _pillow(data: bytes) -> Pixels:
    """Decodes any image to opaque RGB, not yet upright where `turned_by_pillow` says so."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            return np.array(opaque(file))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError
        cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
        raise BadSample("image_truncated" if cut else "image_undecodable", f"{error}") from None
