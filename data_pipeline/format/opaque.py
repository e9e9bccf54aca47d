"""Converts any image to opaque 8-bit RGB."""

import numpy as np
from PIL import Image


def opaque(image: Image.Image) -> Image.Image:
    """Lays transparent pixels on white and keeps the range of 16-bit grey, which Pillow alone would cut at 255."""
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.clip(levels, 0, 255).round().astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")
