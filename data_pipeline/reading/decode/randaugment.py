"""RandAugment (Cubuk et al., 2020) by timm's notation, with every random choice passed in.

    rand-m9-mstd0.5-inc1      magnitude 9 of 10, normal noise of 0.5 on it, severity growing with it; 2 operations (n2)

Operations and their ranges are timm's "increasing" set, with inc0 the original one.
"""

from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from data_pipeline.errors import UserError
from data_pipeline.reading.decode.pixels import Pixels

OPERATIONS = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
_FILL = (128, 128, 128)
_MOST = 10.0  # magnitudes go from 0 to 10


class RandAugment(NamedTuple):
    magnitude: float
    deviation: float
    operations: int
    probability: float
    increasing: bool


@cache
def parse_randaugment(text: str) -> RandAugment:
    """Reads timm's notation. Raises UserError for what it does not know."""
    name, *parts = text.split("-")
    values = {"m": 10.0, "mstd": 0.0, "n": 2.0, "p": 0.5, "inc": 0.0}
    for part in parts:
        word = part.rstrip("0123456789.")
        try:
            if name != "rand" or word not in values:
                raise ValueError
            values[word] = float(part[len(word) :])
        except ValueError:
            raise UserError(
                f"data.augmentation.rand_augment {text!r}: {part!r} is not understood; write as in rand-m9-mstd0.5-inc1"
            ) from None
    if name != "rand":
        raise UserError(
            f"data.augmentation.rand_augment {text!r} must begin with rand, for instance rand-m9-mstd0.5-inc1"
        )
    return RandAugment(values["m"], values["mstd"], int(values["n"]), values["p"], bool(values["inc"]))


def apply_randaugment(view: Pixels, policy: RandAugment, u: list[float]) -> None:
    """Changes `view`, uint8 [S, S, 3], in place. `u`: 4 numbers in [0, 1) an operation: which, whether, size, sign."""
    image = Image.fromarray(view)
    for number in range(policy.operations):
        which, whether, strength, sign = u[4 * number : 4 * number + 4]
        if whether >= policy.probability:
            continue
        magnitude = policy.magnitude
        if policy.deviation:
            magnitude += policy.deviation * NormalDist().inv_cdf(min(max(strength, 1e-9), 1 - 1e-9))
        magnitude = min(max(magnitude, 0.0), _MOST)
        image = operate(image, OPERATIONS[int(which * len(OPERATIONS))], magnitude, sign < 0.5, policy.increasing)
    np.copyto(view, np.asarray(image))


def operate(image: Image.Image, name: str, magnitude: float, negative: bool, increasing: bool) -> Image.Image:
    """One operation at `magnitude` (0 to 10). `negative` flips the direction where there is one."""
    level = magnitude / _MOST
    signed = -level if negative else level
    if name == "auto_contrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "invert":
        return ImageOps.invert(image)
    if name == "posterize":
        bits = 4 - int(level * 4) if increasing else int(level * 4)
        return ImageOps.posterize(image, max(1, bits))  # timm's 0 bits, a black image, are an error in Pillow 13
    if name == "solarize":
        kept = int(level * 256)
        return ImageOps.solarize(image, 256 - kept if increasing else kept)
    if name == "solarize_add":
        table = [min(255, i + min(128, int(level * 110))) if i < 128 else i for i in range(256)]
        return image.point(table * 3)
    if name in _ENHANCE:
        factor = max(0.1, 1 + 0.9 * signed) if increasing else level * 1.8 + 0.1
        return _ENHANCE[name](image).enhance(factor)
    if name == "rotate":
        return image.rotate(30 * signed, resample=Image.Resampling.BICUBIC, fillcolor=_FILL)
    shear, shift = 0.3 * signed, 0.45 * signed
    matrix = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, shift * image.width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift * image.height),
    }[name]
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=_FILL
    )


_ENHANCE = {
    "color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast, "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}  # fmt: skip
