"""Prepares one image for packing: upright, opaque, 8 bits, within bounds; or gives the reason why not.

JPEG            kept as it is where its markers tell that every decoder goes through it; else
                simplejpeg into NumPy; halved in its DCT, once to thrice, as long as it stays large enough
anything else   Pillow
shrink (area average)  ->  turn upright  ->  encode
"""

import io
import warnings
from contextlib import suppress

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from data_pipeline.format.image_header import ImageHeader, read_image_header, too_many_scans
from data_pipeline.format.jpeg_markers import is_sound_jpeg
from data_pipeline.format.opaque import opaque
from data_pipeline.format.pdq import MOST_PIXELS_A_SIDE, pdq
from data_pipeline.format.reasons import EMPTY_IMAGE, END_MARKER_ADDED
from data_pipeline.format.upright import UPRIGHT, orientation, turned_by_pillow, upright
from data_pipeline.preparation.packing.rules import (
    KEPT,
    TOO_MANY_PIXELS,
    UNSUPPORTED,
    ImageRules,
    Prepared,
    Refused,
    no_image_reason,
    size_refused,
)

TOO_MANY_SCANS = "too_many_scans"
TRUNCATED = "image_truncated"
UNDECODABLE = "image_undecodable"

_FORMATS = {extension: format for format, extension in KEPT.items()}
_END_MARKER = b"\xff\xd9"

Pixels = NDArray[np.uint8]


def prepare(data: bytes, rules: ImageRules) -> Prepared | Refused:
    """Turns upright, lays transparency on white, brings CMYK, palettes, 16 bits and floats to 8-bit RGB, shrinks.

    A sound JPEG, PNG or WebP that needs none of this keeps its bytes, unless the rules ask for another format; all else
    becomes JPEG. Of animations the first frame is taken. Every image is decoded once, so that what is packed can be
    read; but for a sequential JPEG that stays as it is, whose markers tell as much. A JPEG that lacks only its end
    marker gets one, and a note.
    """
    if not data:
        return Refused(EMPTY_IMAGE)
    header = read_image_header(data)
    if header is None:
        return Refused(TRUNCATED if data[:3] == b"\xff\xd8\xff" else no_image_reason(data))
    if (refused := size_refused(header, rules)) is not None:
        return refused
    try:
        if _stays_jpeg(header, rules) and is_sound_jpeg(data) and orientation(data, "jpeg") == UPRIGHT:
            return _hashed(Prepared(data, "jpg", "jpeg", header.width, header.height), rules)
        if too_many_scans(data, header):
            return Refused(TOO_MANY_SCANS, header.width, header.height)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # size_refused() has the say
            return _hashed(_converted(data, header, rules), rules)
    except Image.DecompressionBombError:
        return Refused(TOO_MANY_PIXELS, header.width, header.height)
    except UnidentifiedImageError:
        return Refused(UNDECODABLE, header.width, header.height)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged bytes
        if isinstance(error, MemoryError):
            raise
        if header.format.upper() not in Image.OPEN:
            return Refused(UNSUPPORTED, header.width, header.height)
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower() or "incomplete" in str(error).lower()
        return Refused(TRUNCATED if cut else UNDECODABLE, header.width, header.height)


def _stays_jpeg(header: ImageHeader, rules: ImageRules) -> bool:
    """Tells whether an upright JPEG of this size keeps its bytes."""
    shrinks = rules.shorter_side is not None and rules.shorter_side < min(header.width, header.height)
    return header.format == "jpeg" and not shrinks and rules.format in ("keep", "jpg")


def _converted(data: bytes, header: ImageHeader, rules: ImageRules) -> Prepared:
    turn = orientation(data, header.format)
    width, height = (header.width, header.height) if turn < 5 else (header.height, header.width)
    shrinks = rules.shorter_side is not None and rules.shorter_side < min(width, height)
    if shrinks:
        assert rules.shorter_side is not None
        ratio = rules.shorter_side / min(width, height)
        width, height = max(1, round(width * ratio)), max(1, round(height * ratio))
    kept = KEPT.get(header.format, "")
    may_stay = kept != "" and turn == UPRIGHT and not shrinks and rules.format in ("keep", kept)
    note = ""
    pixels: Pixels | None = None
    if header.format == "jpeg":
        data, pixels, note = _jpeg(data, None if may_stay else (width, height) if turn < 5 else (height, width))
        if pixels is not None and may_stay:
            return Prepared(data, "jpg", "jpeg", header.width, header.height, note)
    turned = False
    if pixels is None:
        with Image.open(io.BytesIO(data), formats=[header.format.upper()]) as image:
            stays = may_stay and _is_plain(image, data, header.format)
            if shrinks and header.format == "jpeg":  # CMYK, and JPEGs with faults that do no harm
                image.draft(None, (2 * width, 2 * height))
            image.load()
            if stays:
                return Prepared(data, kept, header.format, *image.size)
            pixels = np.array(opaque(image))
            turned = turned_by_pillow(header.format)
    stored = (width, height) if turn < 5 or turned else (height, width)
    if shrinks and stored != pixels.shape[1::-1]:  # else halving has brought it to its size
        pixels = cv2.resize(pixels, stored, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    if not turned:
        pixels = upright(pixels, turn)
    extension = "jpg" if rules.format == "keep" else rules.format
    encoded = _encode(pixels, extension, rules.quality)
    hashed = pdq(pixels) if rules.pdq else None
    return Prepared(encoded, extension, _FORMATS[extension], pixels.shape[1], pixels.shape[0], note, hashed)


def _hashed(made: Prepared, rules: ImageRules) -> Prepared:
    """Adds the perceptual hash of an image that stayed as it is, decoded no larger than needed."""
    if not rules.pdq or made.pdq is not None:
        return made
    side = MOST_PIXELS_A_SIDE
    pixels = _jpeg(made.data, (side, side))[1] if made.format == "jpeg" else None
    if pixels is None:
        with Image.open(io.BytesIO(made.data), formats=[made.format.upper()]) as image:
            pixels = np.array(opaque(image))
    return made._replace(pdq=pdq(pixels))


def _jpeg(data: bytes, size: tuple[int, int] | None) -> tuple[bytes, Pixels | None, str]:
    """Decodes a JPEG to uint8 RGB [H, W, 3], halved as often as it stays no smaller than `size` (width, height); None
    only looks for faults, at an eighth of its size. Returns the data, with its end marker, the pixels, and a note.

    No pixels: CMYK, or a fault. Pillow decides about these, for many faults are harmless.
    """
    for candidate, note in ((data, ""), (data + _END_MARKER, END_MARKER_ADDED)):
        if note and data.endswith(_END_MARKER):
            break
        with suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(candidate)
            if colours not in ("YCbCr", "Gray", "RGB"):
                break
            if size is None:
                return candidate, simplejpeg.decode_jpeg(candidate, "GRAY", min_height=1, min_width=1), note
            # Only halves have fast code: 5/8 takes longer than the whole.
            half = next((n for n in (8, 4, 2) if height // n >= size[1] and width // n >= size[0]), 1)
            least = {"min_height": -(-height // half), "min_width": -(-width // half), "min_factor": 2}
            return candidate, simplejpeg.decode_jpeg(candidate, "RGB", **(least if half > 1 else {})), note
    return data, None, ""


def _is_plain(image: ImageFile.ImageFile, data: bytes, format: str) -> bool:
    """Tells whether an image can be read by anyone as it is: opaque, 8 bits, grey or RGB, one frame."""
    return (
        image.mode in ("RGB", "L", "P")
        and not image.has_transparency_data
        and getattr(image, "n_frames", 1) == 1
        and (image.mode != "P" or format == "png")
        and not (format == "png" and data[24] == 16)
    )


def _encode(pixels: Pixels, extension: str, quality: int) -> bytes:
    if extension == "jpg":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality, colorsubsampling="420"))
    options = [cv2.IMWRITE_WEBP_QUALITY, quality] if extension == "webp" else []
    done, encoded = cv2.imencode(f".{extension}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise ValueError(f"the picture cannot be written as {extension}")
    return encoded.tobytes()
