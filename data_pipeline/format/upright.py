"""Turns pixels upright, for packing and for reading alike: one rule for what counts as an orientation.

The orientation stands in EXIF (JPEG's APP1, PNG's eXIf or `Raw profile`, WebP's EXIF, TIFF's own tag, AVIF's boxes), at
whatever place in the file, or in XMP where there is no EXIF. Pillow finds it in each of them.
"""

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

UPRIGHT = 1
_TAG, _SHORT = 0x0112, 3  # TIFF 6.0, section 8: Orientation
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 9: 4, 10: 8}  # of a value, by its type
_EXIF = b"Exif\0\0"
_SIGNS = (b"Exif", b"EXIF", b"eXIf", b"rientation", b"Raw profile", b"ns.adobe.com/xap", b"XML:com.adobe.xmp")


def orientation(data: bytes, format: str) -> int:
    """Returns the orientation (1 to 8) of an image of `format` (`image_header`'s name). Damaged metadata counts as 1.

    Orientations from 5 on swap width and height.
    """
    if format not in ("tiff", "avif"):
        head = data[: _jpeg_metadata_end(data)] if format == "jpeg" else data
        if not any(sign in head for sign in _SIGNS):
            return UPRIGHT
        if format == "jpeg" and (found := _plain_exif(head)) is not None:
            return found
    try:
        with Image.open(io.BytesIO(data), formats=[format.upper()]) as image:
            value = image.getexif().get(_TAG, UPRIGHT)
    except Exception:  # Pillow raises many kinds on damaged metadata, which does not make the pixels bad
        return UPRIGHT
    return value if isinstance(value, int) and 1 <= value <= 8 else UPRIGHT


def turned_by_pillow(format: str) -> bool:
    """Tells whether Pillow's decoder of `format` turns the pixels itself, so that nobody may turn them again."""
    return format == "tiff"


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undoes an orientation: uint8 [H, W, 3], contiguous; from orientation 5 on [W, H, 3]."""
    if orientation == UPRIGHT:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _plain_exif(head: bytes) -> int | None:
    """Reads the orientation from a JPEG's one EXIF block where nothing is wrong with it, at a hundredth of what Pillow
    takes; None where only Pillow can tell. TIFF 6.0, section 2."""
    start = head.find(_EXIF)
    block = head[start + len(_EXIF) : start - 2 + int.from_bytes(head[start - 2 : start], "big")]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if start < 0 or order is None or len(block) < 14 or head.count(_EXIF) != 1:
        return None
    (directory,) = struct.unpack_from(order + "I", block, 4)
    (count,) = struct.unpack_from(order + "H", block, min(directory, len(block) - 2))
    entries = block[directory + 2 : directory + 2 + 12 * count]
    if not 0 < 12 * count == len(entries):
        return None
    found = []
    for at, (tag, kind, number, offset) in enumerate(struct.iter_unpack(order + "HHII", entries)):
        size = _BYTES.get(kind, len(block)) * number
        if size > 4 and offset + size > len(block):
            return None
        if tag == _TAG:
            found.append((kind, number, *struct.unpack_from(order + "H", entries, 12 * at + 8)))
    if not found:
        return None if b"rientation" in head else UPRIGHT  # else XMP may tell
    kind, number, value = found[0]
    return value if len(found) == 1 and (kind, number) == (_SHORT, 1) and 1 <= value <= 8 else None


def _jpeg_metadata_end(data: bytes) -> int:
    """Finds where the entropy-coded data begins; the length of `data` where the markers before it are damaged."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            return position
        if marker == 0xFF:
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return len(data)
