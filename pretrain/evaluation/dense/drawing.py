"""Predictions drawn on their picture: boxes with names and scores, masks and label maps as colours over it."""

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.reading.decode.pixels import Pixels

if TYPE_CHECKING:
    from pretrain.evaluation.dense.objects import Found

SIDE = 320  # pixels of a picture in a report
_SHARE = 0.5  # of the colour, over the picture
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def colour_of(number: int) -> tuple[int, int, int]:
    """A colour for each class, RGB; neighbours differ (PASCAL VOC's colour map)."""
    red = green = blue = 0
    number += 1
    for bit in range(8):
        red |= (number & 1) << (7 - bit)
        green |= (number >> 1 & 1) << (7 - bit)
        blue |= (number >> 2 & 1) << (7 - bit)
        number >>= 3
    return red, green, blue


def drawn_objects(pixels: Pixels, found: "Found", names: Sequence[str], least: float) -> Pixels:
    """The picture, uint8 [H, W, 3], with every object of a score of at least `least`, the best on top."""
    out = pixels.copy()
    for number in reversed(range(len(found.scores))):
        if found.scores[number] < least:
            continue
        label = int(found.labels[number])
        if found.masks is not None:
            _cover(out, found.masks[number], colour_of(label))
        name = names[label] if label < len(names) else str(label)
        _box(out, found.boxes[number].tolist(), f"{name} {found.scores[number]:.2f}", colour_of(label))
    return out


def drawn_classes(pixels: Pixels, found: Sequence[tuple[str, float]]) -> Pixels:
    """The picture with classes of the whole, by name and score, one below the other in its corner."""
    out = pixels.copy()
    for number, (name, score) in enumerate(found, 1):
        _text(out, f"{name} {score:.2f}", 0, number * max(12, max(out.shape[:2]) // 40))
    return out


def drawn_map(pixels: Pixels, labels: NDArray[np.uint8], ignored: int = 255) -> Pixels:
    """The picture under the colours of its label map, uint8 [H, W]."""
    out = pixels.copy()
    for label in np.unique(labels).tolist():
        if label != ignored:
            _cover(out, labels == label, colour_of(label))
    return out


def beside_truth(pixels: Pixels, predicted: Pixels, known: Sequence[tuple[Sequence[float], str]]) -> dict[str, str]:
    """Prediction and truth as a result keeps them: data URIs. known: COCO's boxes with their names."""
    truth = pixels.copy()
    for (left, top, width, height), name in known:
        _box(truth, [left, top, left + width, top + height], name, (20, 160, 60))
    return {"predicted": data_uri(predicted), "truth": data_uri(truth)}


def data_uri(pixels: Pixels) -> str:
    """A JPEG of at most SIDE pixels a side."""
    scale = min(1.0, SIDE / max(pixels.shape[:2]))
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
    _, coded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
    return "data:image/jpeg;base64," + base64.b64encode(coded.tobytes()).decode("ascii")


def _cover(out: Pixels, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> None:
    out[mask] = (out[mask] * (1 - _SHARE) + np.array(colour) * _SHARE).astype(np.uint8)


def _box(out: Pixels, box: Sequence[float], text: str, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = (round(value) for value in box)
    cv2.rectangle(out, (left, top), (right, bottom), colour, _stroke(out))
    _text(out, text, left, top)


def _stroke(out: Pixels) -> int:
    return max(1, round(max(out.shape[:2]) / 400))


def _text(out: Pixels, text: str, left: int, top: int) -> None:
    """White in black, its foot at `top`."""
    width, scale = _stroke(out), max(0.3, max(out.shape[:2]) / 1600)
    plain = text.encode("ascii", "replace").decode()  # OpenCV's font has no others
    cv2.putText(out, plain, (left + width, max(top - 2, 8)), _FONT, scale, (0, 0, 0), 2 * width, cv2.LINE_AA)
    cv2.putText(out, plain, (left + width, max(top - 2, 8)), _FONT, scale, (255, 255, 255), width, cv2.LINE_AA)
