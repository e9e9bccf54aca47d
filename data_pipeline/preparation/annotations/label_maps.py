"""A PNG label map beside each picture: value v of a pixel is class v, 255 is no class (ADE20K: 0 is none, 1 the first).

IMAGES/a/b.jpg   LABEL_MAPS/a/b.png

Packed maps are grey PNGs of the picture's size whose values are class numbers, 255 where nothing is to be learned.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_pipeline.errors import UserError
from data_pipeline.format.index import IMAGE_EXTENSIONS

IGNORED = 255
NO_MAP = "label_map_missing"
UNREADABLE_MAP = "label_map_unreadable"
MAP_SIZE = "label_map_size_differs"
UNKNOWN_CLASS = "label_map_class_unknown"


@dataclass(frozen=True)
class Pair:
    """A picture and where its label map should be."""

    number: int
    image: Path
    label_map: Path


def pairs(images: Path, label_maps: Path) -> Iterator[Pair]:
    """One pair a picture below `images`, in the order of their relative paths. UserError: a folder is missing."""
    for folder in (images, label_maps):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; pictures and label maps lie in one folder each")
    found = [path for path in images.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS]
    relative = sorted(path.relative_to(images) for path in found)
    for number, path in enumerate(relative):
        yield Pair(number, images / path, (label_maps / path).with_suffix(".png"))


def convert_label_map(data: bytes, size: tuple[int, int], classes: int, *, reduce_zero_label: bool) -> bytes | str:
    """The map as it is packed, or the reason why it cannot be.

    size: (width, height) of the picture. classes: class numbers are below it. reduce_zero_label: 0 means no class, and
    v means class v - 1.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode not in ("L", "P", "I", "I;16", "1"):
                return UNREADABLE_MAP  # colours: what they mean is another file's matter
            if image.size != size:
                return MAP_SIZE
            values = np.asarray(image).astype(np.int64)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return UNREADABLE_MAP
    if reduce_zero_label:
        values = np.where((values == 0) | (values == IGNORED), IGNORED, values - 1)
    if ((values != IGNORED) & ((values < 0) | (values >= classes))).any():
        return UNKNOWN_CLASS
    stream = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(stream, "PNG", optimize=False)
    return stream.getvalue()
