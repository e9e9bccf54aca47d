"""A whole picture as a module is given it: resized as in training without chance, flipped, padded to the stride."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.reading.batch import normalize
from data_pipeline.reading.config import DataConfig, RectangleConfig
from data_pipeline.reading.decode.pixels import Pixels
from data_pipeline.reading.decode.rectangle import resized
from data_pipeline.reading.decode.views import Crop
from pretrain.tasks.dense.module import clear_beyond, padded


@dataclass(frozen=True)
class View:
    """images: [1, 3, H, W], normalised, zeros beyond `size`, which is (height, width)."""

    images: Tensor
    size: tuple[int, int]
    flipped: bool


@dataclass(frozen=True)
class Looks:
    """How often a picture is looked at: at each of `scales`, and mirrored as well."""

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __iter__(self) -> Iterator[tuple[float, bool]]:
        for scale in self.scales:
            yield scale, False
            if self.flip:
                yield scale, True


def view_of(
    pixels: Pixels, data: DataConfig, device: torch.device, *, scale: float = 1.0, flipped: bool = False
) -> View:
    """pixels: uint8 [H, W, 3]. The shorter side becomes the largest of `data.rectangle.shorter` within `longer`."""
    height, width = pixels.shape[:2]
    size = resized_size(height, width, data.rectangle or RectangleConfig(), scale)
    view = resized(pixels, Crop(0, 0, height, width, flipped, width), *size)
    tall, wide = padded(size)
    views = torch.zeros(1, tall, wide, 3, dtype=torch.uint8)
    views[0, : size[0], : size[1]] = torch.from_numpy(view)
    images = normalize(views.to(device), data.mean, data.std)
    return View(clear_beyond(images, torch.tensor([size], device=device)), size, flipped)


def resized_size(height: int, width: int, shape: RectangleConfig, scale: float = 1.0) -> tuple[int, int]:
    factor = scale * min(max(shape.shorter) / min(height, width), shape.longer / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def windows(height: int, width: int, side: int, step: int) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of windows of at most `side`, `step` apart, that cover the picture; the last ones lie
    at its edge (mmsegmentation's slide mode).
    """
    found = []
    for top in range(0, max(height - side + step - 1, 0) // step * step + 1, step):
        for left in range(0, max(width - side + step - 1, 0) // step * step + 1, step):
            bottom, right = min(top + side, height), min(left + side, width)
            found.append((max(bottom - side, 0), max(right - side, 0), bottom, right))
    return found
