"""Converts any image to opaque 8-bit RGB."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def opaque(image: Image.Image) -> Image.Image:
    """Lays transparent pixels on white; keeps the range of 16 bits and of floats, which Pillow alone would cut at 255.

    Returns the image itself where it is opaque RGB already.
    """
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.clip(levels, 0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image).astype(np.float64))).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def _eight_bits(levels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Brings floats to 0 .. 255 by the range that they are written in: 0 to 1, to 255, to 65,535, else their own.
    What is no number is black."""
    finite = levels[np.isfinite(levels)]
    if finite.size == 0:
        return np.zeros(levels.shape, np.uint8)
    low, high = min(0.0, float(finite.min())), float(finite.max())
    if low < 0 or high > 65535:
        low = float(finite.min())
    else:
        high = next(top for top in (1.0, 255.0, 65535.0) if high <= top)
    scaled = (np.nan_to_num(levels, nan=low, posinf=high, neginf=low) - low) * (255 / max(high - low, 1e-300))
    return np.clip(scaled, 0, 255).round().astype(np.uint8)
