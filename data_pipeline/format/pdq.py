"""PDQ, a perceptual hash of 256 bits: copies of an image that were resized or recompressed differ in few of them.

    luminance -> two passes of a box filter -> 64 x 64 samples -> 16 x 16 lowest frequencies -> bit: above the median

Source: Facebook, "The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm", 2019; bits and quality are
those of the reference implementation in ThreatExchange.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

MOST_PIXELS_A_SIDE = 1024  # larger images are shrunk first, which changes a few bits
_LEAST_PIXELS_A_SIDE = 5
_SAMPLES, _FREQUENCIES = 64, 16
_LUMINANCE = np.array([[0.299, 0.587, 0.114]], dtype=np.float32)
_DCT = np.sqrt(2 / _SAMPLES) * np.cos(
    np.pi / (2 * _SAMPLES) * np.outer(np.arange(1, _FREQUENCIES + 1), 2 * np.arange(_SAMPLES) + 1)
).astype(np.float32)


class Pdq(NamedTuple):
    """bits: 64 hexadecimal digits. quality: 0 to 100; below 50 an image is so plain that its bits are noise."""

    bits: str
    quality: int


def pdq(pixels: NDArray[np.uint8]) -> Pdq:
    """Hashes RGB pixels, uint8 [H, W, 3]."""
    height, width = pixels.shape[:2]
    if min(height, width) < _LEAST_PIXELS_A_SIDE:
        return Pdq("0" * 64, 0)
    if max(height, width) > MOST_PIXELS_A_SIDE:
        width, height = min(width, MOST_PIXELS_A_SIDE), min(height, MOST_PIXELS_A_SIDE)
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    grey = np.asarray(cv2.transform(pixels.astype(np.float32), _LUMINANCE), dtype=np.float32)
    for _ in range(2):
        grey = _mean(_mean(grey, width, 1), height, 0)
    samples = grey[np.ix_(_centres(height), _centres(width))]
    steps = [np.abs(np.trunc(np.diff(samples, axis=axis) * 100 / 255)).sum() for axis in (0, 1)]
    frequencies = _DCT @ samples @ _DCT.T
    bits = frequencies > np.partition(frequencies.ravel(), 127)[127]
    return Pdq(np.packbits(bits.ravel()[::-1]).tobytes().hex(), min(100, int(sum(steps) / 90)))


def _mean(grey: NDArray[np.float32], length: int, axis: int) -> NDArray[np.float32]:
    """Averages over a window of 1/128 of `length` along an axis; at the edges over what lies inside."""
    window = (length + 2 * _SAMPLES - 1) // (2 * _SAMPLES)
    size = (window, 1) if axis == 1 else (1, window)
    before = window - (window + 2) // 2
    anchor = (before, 0) if axis == 1 else (0, before)
    shape = (1, length) if axis == 1 else (length, 1)
    summed, count = (
        cv2.boxFilter(one, -1, size, anchor=anchor, normalize=False, borderType=cv2.BORDER_CONSTANT)
        for one in (grey, np.ones(shape, np.float32))
    )
    return np.asarray(summed / count, dtype=np.float32)


def _centres(length: int) -> NDArray[np.intp]:
    return ((np.arange(_SAMPLES) + 0.5) * length / _SAMPLES).astype(np.intp)
