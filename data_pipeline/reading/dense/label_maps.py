"""One class a pixel as target: the label map, moved with the pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.reading.decode.pixels import BadSample
from data_pipeline.reading.decode.rectangle import Placed, nearest
from data_pipeline.reading.decode.views import Crop
from data_pipeline.reading.storage.shards import RawSample
from data_pipeline.reading.targets import TargetSource
from data_pipeline.reading.workers.memory import Arrays, Layout

IGNORED = 255  # no class: nothing is learned there, nothing is scored
MEMBER = "annotation"


@dataclass(frozen=True)
class LabelMapTargets:
    """Classes of the pixels of B views; IGNORED outside of the view, too."""

    sizes: Tensor  # int64 [B, 2] height and width of the view
    maps: Tensor  # uint8 [B, S, S], over the whole canvas

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, sizes=change(self.sizes), maps=change(self.maps))


class LabelMaps:
    """Makes `LabelMapTargets`. canvas: side of the view's canvas, pixels."""

    members: tuple[str, ...] = (MEMBER,)

    def __init__(self, canvas: int) -> None:
        self._canvas = canvas

    def layout(self, rows: int) -> Layout:
        return {"maps": ((rows, self._canvas, self._canvas), np.uint8)}

    def write(self, row: int, sample: RawSample, source: TargetSource, crops: np.ndarray, arrays: Arrays) -> None:
        values = decode_label_map(sample)
        if source.classes is not None:
            table = np.full(256, IGNORED, np.uint8)
            table[: len(source.classes)] = source.classes
            values = table[values]
        height, width = (int(side) for side in arrays["sizes"][row])
        top, left, tall, wide, flip, source_width = (float(v) for v in crops[0])
        out = arrays["maps"][row]
        out[:] = IGNORED
        crop = Crop(top, left, tall, wide, bool(flip), source_width)
        out[:height, :width] = nearest(values, Placed(crop, height, width))

    def incomplete(self, sample: RawSample, source: TargetSource) -> str:
        return ""

    def finish(self, extras: Sequence[object], arrays: Arrays) -> None:
        pass

    def collate(self, arrays: Arrays, extras: Sequence[object]) -> LabelMapTargets:
        return LabelMapTargets(torch.from_numpy(arrays["sizes"].astype(np.int64)), torch.from_numpy(arrays["maps"]))


def decode_label_map(sample: RawSample) -> NDArray[np.uint8]:
    """uint8 [H, W] over the whole picture. Raises BadSample: annotation_missing, annotation_unreadable."""
    data = sample.members.get(MEMBER)
    if data is None:
        raise BadSample("annotation_missing", "the sample has no label map; pack the pictures with --label-maps")
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.ndim != 2 or values.dtype != np.uint8:
        raise BadSample("annotation_unreadable", "a grey PNG of 8 bits was expected")
    return np.asarray(values, np.uint8)
