"""A set, or single pictures, through a module that gives every pixel a class; one confusion matrix for all scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.reading.config import DataConfig
from data_pipeline.reading.decode.pixels import Pixels
from data_pipeline.reading.dense import IGNORED, whole_pictures
from data_pipeline.reading.dense.label_maps import decode_label_map
from pretrain.configuration.schema import RunConfig
from pretrain.evaluation.dense.drawing import data_uri, drawn_map
from pretrain.evaluation.dense.views import Looks, View, view_of, windows
from pretrain.evaluation.encoding import Evaluated, device_of, inference
from pretrain.evaluation.results import Result
from pretrain.evaluation.sets import describe_set
from pretrain.tasks.dense.module import PredictsClasses, padded

SHOWN = 6
ONCE = Looks()


class Segmenter(Evaluated, PredictsClasses, Protocol):
    """A torch module that gives every pixel a class."""


@dataclass(frozen=True)
class Windows:
    """Sliding windows of `side` pixels, `step` apart; scores of overlapping ones are averaged."""

    side: int
    step: int


@dataclass(frozen=True)
class MapScores:
    """From a confusion matrix. Classes that neither truth nor prediction has are nan, and left out of the means."""

    iou: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    pixel_accuracy: float

    @property
    def mean_iou(self) -> float:
        return float(np.nanmean(self.iou))

    @property
    def mean_accuracy(self) -> float:
        return float(np.nanmean(self.accuracy))


def confusion(truth: NDArray[np.integer], predicted: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """int64 [classes, classes]: pixels of class (row) that were taken for class (column). Ignored truth is left out."""
    known = truth != IGNORED
    places = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def map_scores(matrix: NDArray[np.int64]) -> MapScores:
    """IoU and accuracy by class (Everingham et al., "The PASCAL Visual Object Classes Challenge", 2015)."""
    right = np.diag(matrix).astype(np.float64)
    there, said = matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return MapScores(right / (there + said - right), right / there, float(right.sum() / max(1, matrix.sum())))


def segment(
    module: Segmenter, pixels: Pixels, data: DataConfig, *, look: Looks = ONCE, slide: Windows | None = None
) -> NDArray[np.uint8]:
    """The class of every pixel, uint8 [H, W] of a picture uint8 [H, W, 3]. Call within `inference`."""
    height, width = pixels.shape[:2]
    total: Tensor | None = None
    for scale, flipped in look:
        view = view_of(pixels, data, device_of(module), scale=scale, flipped=flipped)
        scores = _scores(module, view, slide)
        if flipped:
            scores = scores.flip(-1)
        scores = F.interpolate(scores, (height, width), mode="bilinear", align_corners=False)
        total = scores if total is None else total + scores
    assert total is not None, "at least one scale"
    return total[0].argmax(0).to(torch.uint8).cpu().numpy()


def _scores(module: Segmenter, view: View, slide: Windows | None) -> Tensor:
    """[1, classes, h, w] over the view without its padding."""
    height, width = view.size
    if slide is None or max(height, width) <= slide.side:
        return module.class_scores(view.images, [view.size])[:, :, :height, :width]
    total: Tensor | None = None
    count = torch.zeros(1, 1, height, width, device=view.images.device)
    for top, left, bottom, right in windows(height, width, slide.side, slide.step):
        size = bottom - top, right - left
        tall, wide = padded(size)
        window = F.pad(view.images[:, :, top:bottom, left:right], (0, wide - size[1], 0, tall - size[0]))
        scores = module.class_scores(window, [size])[:, :, : size[0], : size[1]]
        if total is None:
            total = scores.new_zeros(1, scores.shape[1], height, width)
        total[:, :, top:bottom, left:right] += scores
        count[:, :, top:bottom, left:right] += 1
    assert total is not None, "windows cover the view"
    return total / count


def score_label_maps(
    module: Segmenter,
    set_folder: Path | str,
    config: RunConfig,
    *,
    classes: Sequence[str] | None,
    look: Looks = ONCE,
    slide: Windows | None = None,
) -> Result:
    """mIoU, mean and pixel accuracy on a set packed with label maps.

    classes: names of the module's classes; the set's are looked up among them by name. Raises UserError where it has
    others, or no pixel of a class.
    """
    about = describe_set(set_folder)
    table = np.full(256, IGNORED, np.int64)
    rows = about.rows_in(classes or ())[:-1].numpy()
    table[: len(rows)] = rows
    names = list(classes or ())
    matrix = np.zeros((len(names), len(names)), np.int64)
    samples = 0
    pictures: list[dict[str, str]] = []
    with inference(module):
        for picture in whole_pictures(set_folder):
            truth = table[decode_label_map(picture.raw)]
            found = segment(module, picture.pixels, config.data, look=look, slide=slide)
            matrix += confusion(truth, found, len(names))
            samples += 1
            if len(pictures) < SHOWN:
                shown = drawn_map(picture.pixels, found), drawn_map(picture.pixels, truth.astype(np.uint8))
                pictures.append(dict(zip(("predicted", "truth"), map(data_uri, shown), strict=True)))
    if not matrix.any():
        raise UserError(f"{set_folder}: no pixel has a class, so nothing can be scored")
    scored, there = map_scores(matrix), matrix.sum(1)
    constant = np.zeros_like(matrix)
    constant[:, int(there.argmax())] = there
    plain = map_scores(constant)
    scores = [
        ("mIoU", "mean IoU of classes", scored.mean_iou, plain.mean_iou),
        ("mAcc", "accuracy, mean of classes", scored.mean_accuracy, plain.mean_accuracy),
        ("aAcc", "accuracy of pixels", scored.pixel_accuracy, plain.pixel_accuracy),
    ]
    return {
        "title": "Label maps",
        "set": about.name,
        "samples": samples,
        "classes": len(names),
        "scores": [
            {"name": name, "title": title, "value": value, "chance": 0.0, "beside": {"largest class": beside}}
            for name, title, value, beside in scores
        ],
        "per_class": {
            name: {"value": float(scored.iou[number]), "samples": int(there[number])}
            for number, name in enumerate(names)
            if np.isfinite(scored.iou[number])
        },
        "settings": {
            "scales": list(look.scales),
            "flip": look.flip,
            "windows": None if slide is None else [slide.side, slide.step],
        },
        "pictures": pictures,
        **about.credit,
    }
