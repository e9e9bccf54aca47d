"""Turns a picture before its crops, augments a view after. Each change draws hashed numbers of its own, and is one
pass of OpenCV.

rotation and shift, of the whole picture -> crop -> colours (brightness, contrast, saturation, hue in random order, then
grey: one affine map) -> blur -> solarize -> RandAugment -> erasing
"""

import functools
import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.hashing import key, uniforms, uniforms_at
from data_pipeline.reading.config import AugmentationConfig, of_view
from data_pipeline.reading.decode import randaugment
from data_pipeline.reading.decode.pixels import Pixels

_COLOUR, _RANDOM, _ERASE, _CAPTION, _BLUR, _SOLARIZE, _TURN = 1, 2, 3, 4, 5, 6, 7
_LUMA = (0.299, 0.587, 0.114)
_SOLARIZED = np.array([value if value < 128 else 255 - value for value in range(256)], np.uint8)
_GREY = np.array([_LUMA, _LUMA, _LUMA])
# Luma and the two colour axes of YIQ (NTSC), in which hue is a rotation.
_YIQ = np.array([_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
_RGB = np.linalg.inv(_YIQ)


def augment(view: Pixels, config: AugmentationConfig, stream: int, position: int, number: int) -> None:
    """Changes `view`, uint8 [S, S, 3], in place. A function of (stream, position, number of the view)."""
    grey = of_view(config.grey, number)
    if config.color_jitter or config.saturation or config.hue or grey:
        u = _draw(10, stream, _COLOUR, position, number)
        saturation = config.color_jitter if config.saturation is None else config.saturation
        strengths = (config.color_jitter, config.color_jitter, saturation, config.hue)
        change_colours(view, strengths if u[8] < config.jitter else (0.0,) * 4, u, grey=u[9] < grey)
    if blur := of_view(config.blur, number):
        happens, width = _draw(2, stream, _BLUR, position, number)
        if happens < blur:
            low, high = config.blur_sigma
            cv2.GaussianBlur(view, (0, 0), low + width * (high - low), dst=view)
    solarize = of_view(config.solarize, number)
    if solarize and _draw(1, stream, _SOLARIZE, position, number)[0] < solarize:
        cv2.LUT(view, _SOLARIZED, dst=view)
    if config.rand_augment:
        policy = randaugment.parse_randaugment(config.rand_augment)
        randaugment.apply_randaugment(view, policy, _draw(4 * policy.operations, stream, _RANDOM, position, number))
    if config.erase:
        erase(view, config.erase, _draw(5, stream, _ERASE, position, number), key(stream, _ERASE, position, number))


def turned(picture: Pixels, config: AugmentationConfig, stream: int, position: int) -> Pixels:
    """The picture rotated and moved, the same for all its views: their crops then still say where the tokens of one
    view lie in the other. A function of (stream, position).
    """
    if not (config.rotate or config.shift):
        return picture
    return turn(picture, config.rotate, config.shift, _draw(3, stream, _TURN, position, 0))


def leave_out_parts(caption: str, share: float, stream: int, position: int) -> str:
    """`caption` without some of its parts, which commas separate: each stays with 1 - share, and one always does.

    A function of (stream, position).
    """
    parts = caption.split(", ")
    if len(parts) == 1:
        return caption
    u = _draw(len(parts), stream, _CAPTION, position, 0)
    return ", ".join(part for part, chance in zip(parts, u, strict=True) if chance >= share or chance == max(u))


def _draw(count: int, stream: int, purpose: int, position: int, number: int) -> list[float]:
    return uniforms_at(_key(stream, purpose, number), position, count)


_key = functools.lru_cache(key)  # cached: few keys, and each image needs them


def change_colours(view: Pixels, strengths: Sequence[float], u: Sequence[float], *, grey: bool = False) -> None:
    """Brightness, contrast and saturation, each times 1 +- its strength, and hue, turned by +- its share of the circle,
    in random order; then grey. `u`: 8 numbers in [0, 1), what each does and its place.

    Each maps a colour x to A x + b, and so do all in a row: one pass, rounded and clipped once. Hue turns in YIQ, which
    keeps luma; torchvision's turns in HSV, which is no linear map.
    """
    a, b = np.eye(3), np.zeros(3)
    mean = np.array(cv2.mean(view)[:3])
    for operation in sorted(range(4), key=lambda n: u[_PLACE[n]]):
        if not strengths[operation]:
            continue
        chance = 2 * u[_CHANCE[operation]] - 1
        factor = max(0.0, 1 + strengths[operation] * chance)
        if operation == 0:  # brightness
            own, shift = factor * np.eye(3), np.zeros(3)
        elif operation == 1:  # contrast: away from the mean grey of what came before
            own, shift = factor * np.eye(3), np.full(3, (1 - factor) * (_GREY[0] @ (a @ mean + b)))
        elif operation == 2:  # saturation: away from the pixel's own grey
            own, shift = factor * np.eye(3) + (1 - factor) * _GREY, np.zeros(3)
        else:
            own, shift = _turned_hue(2 * math.pi * strengths[operation] * chance), np.zeros(3)
        a, b = own @ a, own @ b + shift
    if grey:
        a, b = _GREY @ a, _GREY @ b
    cv2.transform(view, np.column_stack([a, b]), dst=view)


_CHANCE, _PLACE = (0, 1, 2, 6), (3, 4, 5, 7)


def _turned_hue(angle: float) -> NDArray[np.float64]:
    cosine, sine = math.cos(angle), math.sin(angle)
    turned: NDArray[np.float64] = _RGB @ np.array([(1, 0, 0), (0, cosine, -sine), (0, sine, cosine)]) @ _YIQ
    return turned


def turn(picture: Pixels, degrees: float, shift: float, u: Sequence[float]) -> Pixels:
    """`picture`, [H, W, 3], rotated about its centre by +- `degrees` and moved by +- `shift` of each side; the border
    is repeated outwards. `u`: 3 numbers in [0, 1).
    """
    height, width = picture.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees * (2 * u[0] - 1), 1.0)
    matrix[:, 2] += [width * shift * (2 * u[1] - 1), height * shift * (2 * u[2] - 1)]
    size, border = (width, height), cv2.BORDER_REPLICATE
    return np.asarray(cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_LINEAR, borderMode=border), np.uint8)


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
