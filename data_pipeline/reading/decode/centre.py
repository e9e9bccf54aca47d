"""The centre of a whole image, to the last level as timm's evaluation transform gives it.

decode at full size -> Pillow's bicubic resize: the shorter side becomes floor(S / fraction) -> cut the middle S x S
"""

import math

import numpy as np
from PIL import Image

from data_pipeline.reading.decode.pixels import Pixels, decode, read_header
from data_pipeline.reading.decode.views import Crop

INTERPOLATION, CROP_MODE = "bicubic", "center"  # as timm names them; what exports say


def render_centre(data: bytes, max_pixels: int, size: int, fraction: float) -> tuple[Pixels, Crop]:
    """uint8 [size, size, 3], and the box of it in the pixels of the image. Raises BadSample.

    fraction: timm's crop_pct, in (0, 1].
    """
    pixels = decode(data, read_header(data, max_pixels))
    height, width = pixels.shape[:2]
    new_height, new_width = resized(height, width, math.floor(size / fraction))
    image = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    views = np.asarray(image.crop((left, top, left + size, top + size)))
    down, across = height / new_height, width / new_width
    return views, Crop(top * down, left * across, size * down, size * across, False, width)


def resized(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Height and width with the shorter side at `shorter`; the longer one is rounded down, as torchvision does."""
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter
