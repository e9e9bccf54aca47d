"""Draws a view of dense tasks: the (possibly flipped) picture, resized keeping its shape, cropped where it is larger
than the canvas, and laid into the canvas's upper left corner.

A point (x, y) of the flipped picture lies at ((x - left) * w / width, (y - top) * h / height) of the view.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data_pipeline.reading.config import RectangleConfig
from data_pipeline.reading.decode.pixels import Header, Pixels, can_reduce, decode, read_header
from data_pipeline.reading.decode.views import Crop, enlarged, on_reduced


class Placed(NamedTuple):
    """Which part of the flipped picture a view shows, and at what size, pixels."""

    crop: Crop
    height: int
    width: int


def draw_rectangle(
    width: int, height: int, u: Sequence[float], rules: RectangleConfig, canvas: int, flip: float
) -> Placed:
    """The view of a `width` x `height` picture. u: 5 numbers in [0, 1).

    The shorter side becomes one of `rules.shorter`, or the longer one `rules.longer` where that is less; both times a
    factor drawn from `rules.scale`. With scale (0.1, 2) and equal sides this is large-scale jitter (Ghiasi et al.,
    "Simple Copy-Paste", 2021), with (0.5, 2) mmsegmentation's resize.
    """
    shorter = rules.shorter[int(u[0] * len(rules.shorter))]
    factor = rules.scale[0] + u[1] * (rules.scale[1] - rules.scale[0])
    factor *= min(shorter / min(width, height), rules.longer / max(width, height))
    sides = []
    for side, chance in ((height, u[2]), (width, u[3])):
        whole = max(1, round(side * factor))
        if whole <= canvas:
            sides.append((0, side, whole))
        else:
            part = max(1, min(side, round(canvas / factor)))
            sides.append((int(chance * (side - part + 1)), part, canvas))
    (top, part_height, view_height), (left, part_width, view_width) = sides
    return Placed(Crop(top, left, part_height, part_width, u[4] < flip, width), view_height, view_width)


def render_rectangle(data: bytes, max_pixels: int, place: Callable[[Header], Placed]) -> tuple[Pixels, Placed]:
    """Decodes an image and resizes the part that `place` chooses: uint8 [h, w, 3], and what it really shows, which a
    decoder that makes the image smaller rounds to whole pixels of its own. Raises BadSample.
    """
    header = read_header(data, max_pixels)
    placed = place(header)
    crop, height, width = placed
    fits = (factor for factor in (8, 4, 2) if crop.height >= factor * height and crop.width >= factor * width)
    reduce = next(fits, 1) if can_reduce(header) else 1
    pixels = decode(data, header, reduce)
    if reduce > 1:
        crop = on_reduced(crop, reduce, pixels)
    view = resized(pixels, crop, height, width)
    return view, Placed(enlarged(crop, reduce) if reduce > 1 else crop, height, width)


def resized(pixels: Pixels, crop: Crop, height: int, width: int) -> Pixels:
    """The crop of the (to be flipped) picture at `height` x `width`, antialiased bicubic: uint8 [height, width, 3]."""
    top, left, h, w = int(crop.top), int(crop.left), int(crop.height), int(crop.width)
    if crop.flip:
        left = pixels.shape[1] - left - w
    box = pixels[top : top + h, left : left + w]
    if box.shape[:2] != (height, width):
        image = torch.from_numpy(np.ascontiguousarray(box)).unsqueeze(0).permute(0, 3, 1, 2)
        made = F.interpolate(image, (height, width), mode="bicubic", antialias=True)
        box = made[0].permute(1, 2, 0).numpy()
    out = np.empty((height, width, 3), np.uint8)
    np.copyto(out, box[:, ::-1] if crop.flip else box)
    return out


def nearest(values: NDArray[np.uint8], placed: Placed) -> NDArray[np.uint8]:
    """What the view shows of a map over the whole picture, uint8 [H, W] -> [h, w]: the value at each pixel's centre."""
    crop, height, width = placed
    rows = np.floor(crop.top + (np.arange(height) + 0.5) * crop.height / height)
    columns = np.floor(crop.left + (np.arange(width) + 0.5) * crop.width / width)
    if crop.flip:
        columns = crop.source_width - 1 - columns
    rows = np.clip(rows, 0, values.shape[0] - 1).astype(np.intp)
    columns = np.clip(columns, 0, values.shape[1] - 1).astype(np.intp)
    return values[rows[:, None], columns]


def points_in_view(points: NDArray[np.float64], placed: Placed) -> NDArray[np.float64]:
    """Points [n, 2] (x, y) of the picture -> of the view, also those outside of it."""
    crop, height, width = placed
    x = crop.source_width - points[:, 0] if crop.flip else points[:, 0]
    return np.stack([(x - crop.left) * width / crop.width, (points[:, 1] - crop.top) * height / crop.height], axis=1)


def boxes_in_view(boxes: NDArray[np.float64], placed: Placed) -> NDArray[np.float64]:
    """COCO's boxes [n, 4] (x, y, w, h) -> (left, top, right, bottom) in the view, cut to it."""
    corners = np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    moved = points_in_view(corners.reshape(-1, 2), placed).reshape(-1, 2, 2)
    found = np.concatenate([moved.min(1), moved.max(1)], axis=1)
    edges = np.array([placed.width, placed.height] * 2, np.float64)
    inside: NDArray[np.float64] = np.minimum(np.maximum(found, 0.0), edges)
    return inside
