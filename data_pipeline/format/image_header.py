"""Reads format and size from an image's first bytes, without decoding: for pixel caps and for indexing."""

from functools import partial
from typing import Literal, NamedTuple

_USUAL_SCANS = 24
_SCANNED_PIXELS = 500_000_000  # scans times pixels: about a second and a half of one core


class ImageHeader(NamedTuple):
    """Format by content (not by file name) and size in pixels as stored, before any EXIF orientation."""

    format: str
    width: int
    height: int


def read_image_header(data: bytes) -> ImageHeader | None:
    """Reads the header of a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF image; None where `data` is none or too short."""
    if _is_avif(data):
        return _avif(data)
    for signature, read in _READERS:
        if data.startswith(signature):
            try:
                found = read(data)
            except (IndexError, ValueError):
                return None
            return found if found is not None and found.width > 0 and found.height > 0 else None
    return None


def is_image(data: bytes | bytearray) -> bool:
    """Tells whether `data` (16 bytes are enough) begins as an image of these formats does."""
    return _is_avif(data) or (
        any(data.startswith(signature) for signature, _ in _READERS) and (data[:4] != b"RIFF" or data[8:12] == b"WEBP")
    )


def too_many_scans(data: bytes, header: ImageHeader) -> bool:
    """Tells whether a progressive JPEG has so many scans that decoding takes many times what its size promises.

    Each scan goes over the whole picture: 200 of them over 40 million pixels take 22 s. Encoders write up to 12.
    """
    if header.format != "jpeg" or _has_one_scan(data):
        return False
    scans = data.count(b"\xff\xda")
    return scans > _USUAL_SCANS and scans * header.width * header.height > _SCANNED_PIXELS


def _jpeg(data: bytes) -> ImageHeader | None:
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            position += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = _big(data, position + 5, 2), _big(data, position + 7, 2)
            return ImageHeader("jpeg", width, height)
        elif marker in (0xD9, 0xDA):  # the picture began, or ended, without a frame header
            return None
        else:
            position += 2 + _big(data, position + 2, 2)
    return None


def _png(data: bytes) -> ImageHeader | None:
    if data[12:16] != b"IHDR":
        return None
    return ImageHeader("png", _big(data, 16, 4), _big(data, 20, 4))


def _webp(data: bytes) -> ImageHeader | None:
    kind = data[12:16]
    if data[8:12] != b"WEBP":
        return None
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return ImageHeader("webp", _little(data, 26, 2) & 0x3FFF, _little(data, 28, 2) & 0x3FFF)
    if kind == b"VP8L" and data[20:21] == b"\x2f":
        bits = _little(data, 21, 4)
        return ImageHeader("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8X":
        return ImageHeader("webp", _little(data, 24, 3) + 1, _little(data, 27, 3) + 1)
    return None


def _gif(data: bytes) -> ImageHeader | None:
    return ImageHeader("gif", _little(data, 6, 2), _little(data, 8, 2))


def _bmp(data: bytes) -> ImageHeader | None:
    if _little(data, 14, 4) == 12:  # OS/2's short header
        return ImageHeader("bmp", _little(data, 18, 2), _little(data, 20, 2))
    height = _little(data, 22, 4)
    return ImageHeader("bmp", _little(data, 18, 4), height if height < 2**31 else 2**32 - height)


def _tiff(data: bytes) -> ImageHeader | None:
    read = _little if data[:2] == b"II" else _big
    directory = read(data, 4, 4)
    found: dict[int, int] = {}
    for entry in range(directory + 2, directory + 2 + 12 * read(data, directory, 2), 12):
        tag, kind = read(data, entry, 2), read(data, entry + 2, 2)
        if tag in (256, 257) and kind in (3, 4):  # ImageWidth, ImageLength; SHORT or LONG
            found[tag] = read(data, entry + 8, 2 if kind == 3 else 4)
    return ImageHeader("tiff", found[256], found[257]) if len(found) == 2 else None


def _has_one_scan(data: bytes) -> bool:
    """Tells whether a JPEG's first scan holds all components of a sequential frame, as most files' does: counting the
    scans of the others takes as long as a tenth of decoding."""
    position, components = 2, 0
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            return 0 < components == data[position + 4]
        if marker == 0xFF:
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
        else:
            if marker in (0xC0, 0xC1):
                components = data[position + 9]
            position += 2 + _big(data, position + 2, 2)
    return False


def _is_avif(data: bytes | bytearray) -> bool:
    """ISO/IEC 23000-22: the file type box names the brand `avif` (a sequence: `avis`), as its own or among others."""
    if data[4:8] != b"ftyp":
        return False
    brands = data[8 : max(16, min(int.from_bytes(data[:4], "big"), 256))]
    return any(brands[at : at + 4] in (b"avif", b"avis") for at in (0, *range(8, len(brands), 4)))


def _avif(data: bytes) -> ImageHeader | None:
    """Takes the largest of the boxes `ispe` (ISO/IEC 23008-12, section 6.5.3): thumbnails and tiles have their own."""
    sizes = []
    position = data.find(b"ispe")
    while position >= 0 and position + 16 <= len(data):
        sizes.append((_big(data, position + 8, 4), _big(data, position + 12, 4)))
        position = data.find(b"ispe", position + 4)
    width, height = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    return ImageHeader("avif", width, height) if width > 0 and height > 0 else None


def _integer(data: bytes, position: int, size: int, *, order: Literal["big", "little"]) -> int:
    field = data[position : position + size]
    if len(field) < size:
        raise IndexError("header cut")
    return int.from_bytes(field, order)


_big, _little = partial(_integer, order="big"), partial(_integer, order="little")
_READERS = (
    (b"\xff\xd8\xff", _jpeg), (b"\x89PNG\r\n\x1a\n", _png), (b"RIFF", _webp), (b"GIF8", _gif), (b"BM", _bmp),
    (b"II*\0", _tiff), (b"MM\0*", _tiff),
)  # fmt: skip
