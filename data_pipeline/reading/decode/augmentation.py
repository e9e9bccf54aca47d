"""Augments a view after its crop: colours, RandAugment, erasing. Each draws hashed numbers of its own."""

import functools

import cv2
import numpy as np

from data_pipeline.hashing import key, uniforms, uniforms_at
from data_pipeline.reading.config import AugmentationConfig
from data_pipeline.reading.decode import randaugment
from data_pipeline.reading.decode.pixels import Pixels

_COLOUR, _RANDOM, _ERASE = 1, 2, 3
_LUMA = (0.299, 0.587, 0.114)


def augment(view: Pixels, config: AugmentationConfig, stream: int, position: int, number: int) -> None:
    """Changes `view`, uint8 [S, S, 3], in place. A function of (stream, position, number of the view)."""
    if config.color_jitter:
        jitter_colours(view, config.color_jitter, _draw(6, stream, _COLOUR, position, number))
    if config.rand_augment:
        policy = randaugment.parse_randaugment(config.rand_augment)
        randaugment.apply_randaugment(view, policy, _draw(4 * policy.operations, stream, _RANDOM, position, number))
    if config.erase:
        erase(view, config.erase, _draw(5, stream, _ERASE, position, number), key(stream, _ERASE, position, number))


def _draw(count: int, stream: int, purpose: int, position: int, number: int) -> list[float]:
    return uniforms_at(_key(stream, purpose, number), position, count)


_key = functools.lru_cache(key)  # cached: few keys, and each image needs them


def jitter_colours(view: Pixels, strength: float, u: list[float]) -> None:
    """Brightness, contrast and saturation, each scaled by 1 +- strength, in random order. `u`: 6 numbers in [0, 1).

    Each maps a colour x to a x + b grey(x) + c, and so do the three in a row: one pass, rounded and clipped once.
    """
    a, b, c = 1.0, 0.0, 0.0
    mean = sum(weight * value for weight, value in zip(_LUMA, cv2.mean(view), strict=False))
    for operation in sorted(range(3), key=lambda n: u[3 + n]):
        factor = max(0.0, 1 + strength * (2 * u[operation] - 1))
        if operation == 2:  # away from the pixel's own grey, which is (a + b) grey(x) + c by now
            a, b = factor * a, factor * b + (1 - factor) * (a + b)
            continue
        pivot = (a + b) * mean + c if operation == 1 else 0.0  # contrast: away from the mean grey
        a, b, c = factor * a, factor * b, factor * c + (1 - factor) * pivot
    red, green, blue = (b * weight for weight in _LUMA)
    rows = [[a + red, green, blue, c], [red, a + green, blue, c], [red, green, a + blue, c]]
    cv2.transform(view, np.array(rows), dst=view)


def erase(view: Pixels, probability: float, u: list[float], stream: int) -> None:
    """Random erasing (Zhong et al., 2020) with noise: a box of 2 to 33 % of the area, aspect 0.3 to 3.3."""
    if u[0] >= probability:
        return
    size = view.shape[0]
    area, aspect = size * size * (0.02 + u[1] * 0.31), 0.3 * (1 / 0.09) ** u[2]
    h = max(1, min(size, round((area * aspect) ** 0.5)))
    w = max(1, min(size, round((area / aspect) ** 0.5)))
    top, left = int(u[3] * (size - h + 1)), int(u[4] * (size - w + 1))
    noise = uniforms(stream, np.arange(h, dtype=np.int64), 3 * w) * 256
    view[top : top + h, left : left + w] = noise.astype(np.uint8).reshape(h, w, 3)
