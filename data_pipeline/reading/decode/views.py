"""Draws random views: a pure function of hashed numbers picks the crop, an antialiased resize renders it.

The whole image is flipped first, then cropped: crop parameters are those of the flipped image.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data_pipeline.reading.decode.pixels import Header, Pixels, can_reduce, decode, read_header

TRIES = 10
UNIFORMS = 2 * TRIES + 3  # hashed numbers that one crop uses


class Crop(NamedTuple):
    """A box in the flipped image, pixels."""

    top: float
    left: float
    height: float
    width: float
    flip: bool
    source_width: float


def random_crop(
    width: int, height: int, u: Sequence[float], scale: tuple[float, float], ratio: tuple[float, float], flip: float
) -> Crop:
    """Draws a random resized crop (Szegedy et al., Going deeper with convolutions, 2015) of a `width` x `height` image.

    `u`: UNIFORMS numbers in [0, 1). Area uniform in `scale`, aspect log-uniform in `ratio`, first of TRIES that fits;
    else the largest central crop within `ratio`.
    """
    mirrored = u[2] < flip
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(TRIES):
        a, b = (u[3], u[4]) if attempt == 0 else (u[3 + 2 * attempt], u[4 + 2 * attempt])
        area = width * height * (scale[0] + a * (scale[1] - scale[0]))
        aspect = math.exp(low + b * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(u[0] * (height - h + 1)), int(u[1] * (width - w + 1)), h, w, mirrored, width)
    w, h = width, height
    if width < ratio[0] * height:
        h = min(height, max(1, round(width / ratio[0])))
    elif width > ratio[1] * height:
        w = min(width, max(1, round(height * ratio[1])))
    return Crop((height - h) // 2, (width - w) // 2, h, w, mirrored, width)


def reduction(crops: Sequence[Crop], size: int) -> int:
    """Returns the largest of 8, 4, 2 by which the image may be decoded smaller, crops being `size` at least; or 1."""
    smallest = min(min(crop.height, crop.width) for crop in crops)
    return next((factor for factor in (8, 4, 2) if smallest >= factor * size), 1)


def on_reduced(crop: Crop, reduce: int, pixels: Pixels) -> Crop:
    """Maps a crop to whole pixels of the image decoded 1/reduce as large."""
    height, width = pixels.shape[:2]
    h, w = min(height, max(1, round(crop.height / reduce))), min(width, max(1, round(crop.width / reduce)))
    top, left = min(height - h, round(crop.top / reduce)), min(width - w, round(crop.left / reduce))
    return Crop(top, left, h, w, crop.flip, width)


def enlarged(crop: Crop, reduce: int) -> Crop:
    """Maps a crop of the reduced image to pixels of the whole image."""
    top, left, height, width, flip, source_width = crop
    return Crop(top * reduce, left * reduce, height * reduce, width * reduce, flip, source_width * reduce)


def render_views(
    data: bytes,
    max_pixels: int,
    choose: Callable[[Header], Sequence[Crop]],
    change: Callable[[Pixels], Pixels],
    views: Pixels,
    crops: NDArray[np.float32],
) -> None:
    """Decodes an image, changes it by `change`, which keeps its size, and writes the crops that `choose` picks: views
    uint8 [V, S, S, 3], crops float32 [V, 6].

    The decoder makes the image smaller where every crop stays at least S. Raises BadSample.
    """
    header = read_header(data, max_pixels)
    chosen = choose(header)
    reduce = reduction(chosen, views.shape[1]) if can_reduce(header) else 1
    pixels = change(decode(data, header, reduce))
    for number, crop in enumerate(chosen):
        if reduce > 1:
            crop = on_reduced(crop, reduce, pixels)
        render(pixels, crop, views[number])
        crops[number] = enlarged(crop, reduce) if reduce > 1 else crop


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch from splitting one small image over threads, which costs more than it gains (ten times as much where
    the cores are busy). For reading in the training process; workers have one thread anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def render(pixels: Pixels, crop: Crop, out: Pixels) -> None:
    """Resizes `crop` of the (to be flipped) image into `out`, uint8 [S, S, 3].

    Antialiased bicubic, torch's uint8 kernel: within 1 level of Pillow's `resize(..., BICUBIC)`, and much faster.
    """
    top, left, h, w = int(crop.top), int(crop.left), int(crop.height), int(crop.width)
    if crop.flip:
        left = pixels.shape[1] - left - w
    size = out.shape[0]
    box = pixels[top : top + h, left : left + w]
    if box.shape[:2] == out.shape[:2]:
        resized = box
    else:
        image = torch.from_numpy(box).unsqueeze(0).permute(0, 3, 1, 2)  # channels last by its strides, as the result is
        resized = F.interpolate(image, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    if crop.flip:
        cv2.flip(resized, 1, dst=out)
    else:
        np.copyto(out, resized)
