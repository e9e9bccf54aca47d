"""Prepares one image for packing: upright, opaque, 8 bits, within bounds; or gives the reason why not."""

import io
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from data_pipeline.errors import UserError
from data_pipeline.format.image_header import ImageHeader, read_image_header
from data_pipeline.format.index import EMPTY_IMAGE, NOT_AN_IMAGE
from data_pipeline.format.opaque import opaque

TOO_MANY_PIXELS = "too_many_pixels"
TOO_SMALL = "too_small"
TRUNCATED = "image_truncated"
UNDECODABLE = "image_undecodable"

_ORIENTATION = 274  # TIFF 6.0, section 8: how rows and columns lie
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_KEPT = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # formats that may stand in a shard, by their extension


@dataclass(frozen=True)
class ImageRules:
    """Rules for every image of a set.

    shorter_side: images whose shorter side is longer are shrunk to it (area average); None leaves the size alone
    min_side: images with a shorter side below it are rejected
    max_pixels: images above it are refused before they are decoded (decompression bombs)
    quality: of the JPEG that an image becomes where it cannot stay as it is
    """

    shorter_side: int | None = None
    min_side: int = 1
    max_pixels: int = 89_478_485
    quality: int = 95

    def __post_init__(self) -> None:
        if self.shorter_side is not None and self.shorter_side < 1:
            raise UserError(f"shorter_side {self.shorter_side}: give a number of pixels of 1 or more, or leave it out")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality {self.quality}: JPEG quality runs from 1 to 100")
        if not 1 <= self.max_pixels <= 178_956_970:
            raise UserError(f"max_pixels {self.max_pixels}: the decoder takes 1 to 178,956,970 pixels")


class Prepared(NamedTuple):
    """Bytes as they will stand in the shard; `extension` is the member's, `format` the sidecar's."""

    data: bytes
    extension: str
    format: str
    width: int
    height: int


class Refused(NamedTuple):
    """An image that is not packed; its size where the header told."""

    reason: str
    width: int | None = None
    height: int | None = None


def prepare(data: bytes, rules: ImageRules) -> Prepared | Refused:
    """Applies EXIF orientation, lays transparency on white, brings CMYK, palettes and 16 bits to 8-bit RGB, shrinks.

    A sound JPEG, PNG or WebP that needs none of this keeps its bytes; all else becomes JPEG. Of animations the first
    frame is taken. Every image is decoded once, so that what is packed can be read.
    """
    if not data:
        return Refused(EMPTY_IMAGE)
    header = read_image_header(data)
    if header is None:
        return Refused(TRUNCATED if data[:3] == b"\xff\xd8\xff" else NOT_AN_IMAGE)
    if (refused := size_refused(header, rules)) is not None:
        return refused
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # size_refused() has the say
            return _converted(data, header, rules)
    except Image.DecompressionBombError:
        return Refused(TOO_MANY_PIXELS, header.width, header.height)
    except UnidentifiedImageError:
        return Refused(UNDECODABLE, header.width, header.height)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged bytes
        if isinstance(error, MemoryError):
            raise
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower() or "incomplete" in str(error).lower()
        return Refused(TRUNCATED if cut else UNDECODABLE, header.width, header.height)


def size_refused(header: ImageHeader, rules: ImageRules) -> Refused | None:
    """Returns the reason to reject an image of this size, None where there is none."""
    if header.width * header.height > rules.max_pixels:
        return Refused(TOO_MANY_PIXELS, header.width, header.height)
    if min(header.width, header.height) < rules.min_side:
        return Refused(TOO_SMALL, header.width, header.height)
    return None


def _converted(data: bytes, header: ImageHeader, rules: ImageRules) -> Prepared:
    with Image.open(io.BytesIO(data), formats=[header.format.upper()]) as image:
        orientation = _orientation(image)
        scale = None if rules.shorter_side is None else rules.shorter_side / min(image.size)
        shrinks = scale is not None and scale < 1
        keeps = (
            header.format in _KEPT
            and orientation == 1
            and not shrinks
            and image.mode in ("RGB", "L", "P")
            and not image.has_transparency_data
            and getattr(image, "n_frames", 1) == 1
            and (image.mode != "P" or header.format == "png")
            and not (header.format == "png" and data[24] == 16)
        )
        if shrinks and header.format == "jpeg":  # DCT scaling: decode no more than twice what is kept
            image.draft(None, (2 * round(image.width * scale), 2 * round(image.height * scale)))  # type: ignore[operator]
        image.load()
        if keeps:
            return Prepared(data, _KEPT[header.format], header.format, *image.size)
        pixels = opaque(image)
    if orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    array = np.ascontiguousarray(pixels)
    if shrinks:
        assert rules.shorter_side is not None
        width, height = (header.width, header.height) if orientation < 5 else (header.height, header.width)
        ratio = rules.shorter_side / min(width, height)
        size = max(1, round(width * ratio)), max(1, round(height * ratio))
        array = cv2.resize(array, size, interpolation=cv2.INTER_AREA)
    encoded = simplejpeg.encode_jpeg(array, quality=rules.quality, colorsubsampling="420")
    return Prepared(encoded, "jpg", "jpeg", array.shape[1], array.shape[0])


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata does not make the pixels bad; Pillow raises many kinds
        return 1
    return value if value in _UPRIGHT else 1
