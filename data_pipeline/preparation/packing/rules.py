"""What images of a set must be, what becomes of them, and which are refused before they are decoded.

Loads no decoder: the owner of processes that decode needs none.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from data_pipeline.errors import UserError
from data_pipeline.format.image_header import ImageHeader
from data_pipeline.format.reasons import NOT_AN_IMAGE

if TYPE_CHECKING:
    from data_pipeline.format.pdq import Pdq

TOO_MANY_PIXELS = "too_many_pixels"
TOO_SMALL = "too_small"
UNSUPPORTED = "format_unsupported"  # a picture, of a format that is not read here

ImageFormat = Literal["keep", "jpg", "png", "webp"]

KEPT = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # formats that may stand in a shard, by their extension
_FOREIGN = (b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"8BPS")  # JPEG XL, JPEG 2000, PSD


@dataclass(frozen=True)
class ImageRules:
    """Rules for every image of a set.

    shorter_side: images whose shorter side is longer are shrunk to it (JPEGs halved in their DCT, then area average);
        None leaves the size alone
    min_side: images with a shorter side below it are rejected
    max_pixels: images above it are refused before they are decoded (decompression bombs)
    max_bytes: files above it are refused; no more of a file is read
    quality: of the JPEG or WebP that an image becomes where it cannot stay as it is
    pdq: also makes each image's perceptual hash, from the pixels that are encoded, or of a file that stays as it is
    format: keep leaves JPEG, PNG and WebP as they are where nothing else changes; jpg, png, webp bring all to one
    """

    shorter_side: int | None = None
    min_side: int = 1
    max_pixels: int = 89_478_485
    max_bytes: int = 100_000_000
    quality: int = 95
    format: ImageFormat = "keep"
    pdq: bool = False

    def __post_init__(self) -> None:
        if self.shorter_side is not None and self.shorter_side < 1:
            raise UserError(f"shorter_side {self.shorter_side}: give a number of pixels of 1 or more, or leave it out")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality {self.quality}: JPEG quality runs from 1 to 100")
        if not 1 <= self.max_pixels <= 178_956_970:
            raise UserError(f"max_pixels {self.max_pixels}: the decoder takes 1 to 178,956,970 pixels")
        if self.max_bytes < 1:
            raise UserError(f"max_bytes {self.max_bytes}: must be above zero")
        if self.format != "keep" and self.format not in KEPT.values():
            raise UserError(f"format {self.format!r}: give keep, {', '.join(KEPT.values())}")


class Prepared(NamedTuple):
    """Bytes as they will stand in the shard; `extension` is the member's, `format` the sidecar's. `note`: what was
    mended, "" for nothing."""

    data: bytes
    extension: str
    format: str
    width: int
    height: int
    note: str = ""
    pdq: "Pdq | None" = None


class Refused(NamedTuple):
    """An image that is not packed; its size where the header told."""

    reason: str
    width: int | None = None
    height: int | None = None


def size_refused(header: ImageHeader, rules: ImageRules) -> Refused | None:
    """Returns the reason to reject an image of this size, None where there is none."""
    if header.width * header.height > rules.max_pixels:
        return Refused(TOO_MANY_PIXELS, header.width, header.height)
    if min(header.width, header.height) < rules.min_side:
        return Refused(TOO_SMALL, header.width, header.height)
    return None


def no_image_reason(data: bytes | bytearray) -> str:
    """Tells a picture of a format that is not read here (HEIC, JPEG XL, JPEG 2000, PSD) from what is no picture."""
    return UNSUPPORTED if data[4:8] == b"ftyp" or data.startswith(_FOREIGN) else NOT_AN_IMAGE
