"""RandAugment's operations against timm's, and its notation."""

import io
import random

import numpy as np
import pytest
from PIL import Image
from reading_sets import picture
from timm.data import auto_augment as timm_ops

from data_pipeline.errors import UserError
from data_pipeline.reading.config import AugmentationConfig
from data_pipeline.reading.decode import randaugment
from data_pipeline.reading.decode.augmentation import augment

TIMM = {"translate_x": "TranslateXRel", "translate_y": "TranslateYRel", "shear_x": "ShearX", "shear_y": "ShearY"}


def timm_name(name: str, increasing: bool) -> str:
    plain = TIMM.get(name, "".join(word.capitalize() for word in name.split("_")))
    return plain + "Increasing" if increasing and plain + "Increasing" in timm_ops.NAME_TO_OP else plain


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_operations_are_timms(monkeypatch, name, increasing):
    image = Image.open(io.BytesIO(picture(11, size=(40, 40)))).convert("RGB")
    for magnitude in (3.0, 5.0, 9.0):
        for negative in (False, True):
            monkeypatch.setattr(timm_ops, "_randomly_negate", lambda v, negative=negative: -v if negative else v)
            hparams = {"translate_pct": 0.45, "img_mean": (128, 128, 128), "interpolation": Image.Resampling.BICUBIC}
            operation = timm_ops.AugmentOp(timm_name(name, increasing), prob=1.0, magnitude=magnitude, hparams=hparams)
            expected = operation(image)
            found = randaugment.operate(image, name, magnitude, negative, increasing)
            assert np.array_equal(np.asarray(found), np.asarray(expected)), (magnitude, negative)


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_operations_stand_every_magnitude(name, increasing):
    image = Image.open(io.BytesIO(picture(11, size=(20, 20)))).convert("RGB")
    for magnitude in (0.0, 0.01, 9.99, 10.0):
        assert randaugment.operate(image, name, magnitude, True, increasing).size == (20, 20)


def test_the_notation_is_timms():
    assert randaugment.parse_randaugment("rand-m9-mstd0.5-inc1") == (9.0, 0.5, 2, 0.5, True)
    assert randaugment.parse_randaugment("rand-m7-n3-p0.8") == (7.0, 0.0, 3, 0.8, False)
    for wrong in ("augmix-m9", "rand-q3", "rand-mx"):
        with pytest.raises(UserError, match="rand_augment"):
            randaugment.parse_randaugment(wrong)


def test_augmentation_is_a_function_of_position_and_view_alone():
    config = AugmentationConfig(rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, erase=0.5)
    start = np.asarray(Image.open(io.BytesIO(picture(12, size=(32, 32)))).convert("RGB"))

    def changed(position: int, view: int) -> bytes:
        random.seed(position * 7 + view)  # nothing may draw from here, or from numpy
        np.random.seed(view)
        copy = start.copy()
        augment(copy, config, 99, position, view)
        return copy.tobytes()

    first = {(position, view): changed(position, view) for position in range(6) for view in range(2)}
    assert first == {(position, view): changed(position, view) for position in range(6) for view in range(2)}
    assert len(set(first.values())) == 12
