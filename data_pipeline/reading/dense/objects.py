"""COCO's objects as targets: boxes, classes and masks in the pixels of the view."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as rle
from torch import Tensor

from data_pipeline.reading.decode.pixels import BadSample
from data_pipeline.reading.decode.rectangle import Placed, boxes_in_view, nearest, points_in_view
from data_pipeline.reading.decode.views import Crop
from data_pipeline.reading.storage.shards import RawSample
from data_pipeline.reading.targets import TargetSource
from data_pipeline.reading.workers.memory import Arrays, Layout

SMALLEST = 1.0  # pixels of a view; of an object that shows less than that on one side nothing can be learned
MEMBER = "annotation"


@dataclass(frozen=True)
class ObjectTargets:
    """Objects of B samples, crowds left out. In pixels of the view, which `sizes` bounds; the canvas is larger."""

    sizes: Tensor  # int64 [B, 2] height and width
    boxes: tuple[Tensor, ...]  # float32 [n, 4] left, top, right, bottom
    labels: tuple[Tensor, ...]  # int64 [n]
    masks: tuple[Tensor, ...]  # uint8 [n, height, width]; empty where boxes alone are asked for

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            sizes=change(self.sizes),
            boxes=tuple(map(change, self.boxes)),
            labels=tuple(map(change, self.labels)),
            masks=tuple(map(change, self.masks)),
        )


class Annotation(NamedTuple):
    """KEY.objects.json: COCO's id of the picture, and its objects with categories numbered from 0."""

    image_id: int
    objects: list[dict[str, Any]]


def parse_annotation(sample: RawSample) -> Annotation:
    """Raises BadSample: annotation_missing, annotation_unreadable."""
    data = sample.members.get(MEMBER)
    if data is None:
        raise BadSample("annotation_missing", "the sample has no objects; pack the pictures with --coco")
    try:
        content = json.loads(data)
        return Annotation(int(content["image_id"]), list(content["objects"]))
    except (ValueError, KeyError, TypeError) as error:
        raise BadSample("annotation_unreadable", str(error)) from None


def outline_mask(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """uint8 [height, width] of a packed segmentation of a picture of that size: polygons or an RLE."""
    coded = rle.merge(rle.frPyObjects(segmentation, height, width)) if isinstance(segmentation, list) else segmentation
    found: NDArray[np.uint8] = rle.decode(coded)
    return found


class _Row(NamedTuple):
    """What a worker sends of one sample beside the arrays."""

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: list[dict[str, Any]]


class Objects:
    """Makes `ObjectTargets`. masks: of every object; an object without an outline is its box."""

    members: tuple[str, ...] = (MEMBER,)

    def __init__(self, *, masks: bool) -> None:
        self._masks = masks

    def layout(self, rows: int) -> Layout:
        return {}

    def write(self, row: int, sample: RawSample, source: TargetSource, crops: np.ndarray, arrays: Arrays) -> _Row:
        objects = [one for one in parse_annotation(sample).objects if not one["iscrowd"]]
        height, width = (int(side) for side in arrays["sizes"][row])
        top, left, tall, wide, flip, source_width = (float(v) for v in crops[0])
        placed = Placed(Crop(top, left, tall, wide, bool(flip), source_width), height, width)
        boxes = boxes_in_view(np.array([one["bbox"] for one in objects], np.float64).reshape(-1, 4), placed)
        labels = [source.category(int(one["category"])) for one in objects]
        kept, masks = [], []
        for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            if label < 0 or min(box[2] - box[0], box[3] - box[1]) < SMALLEST:
                continue
            if self._masks:
                mask = _mask_in_view(objects[number].get("segmentation"), box, placed)
                if not rle.area(mask):
                    continue
                masks.append(mask)
            kept.append(number)
        return _Row(boxes[kept].astype(np.float32), np.array(labels, np.int64)[kept], masks)

    def incomplete(self, sample: RawSample, source: TargetSource) -> str:
        return ""

    def finish(self, extras: Sequence[object], arrays: Arrays) -> None:
        pass

    def collate(self, arrays: Arrays, extras: Sequence[object]) -> ObjectTargets:
        rows = [row for row in extras if isinstance(row, _Row)]
        sizes = torch.from_numpy(arrays["sizes"].astype(np.int64))
        masks = []
        for row, (height, width) in zip(rows, sizes.tolist(), strict=True):
            decoded = rle.decode(row.masks) if row.masks else np.zeros((height, width, 0), np.uint8)
            masks.append(torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1))))
        return ObjectTargets(
            sizes,
            tuple(torch.from_numpy(row.boxes) for row in rows),
            tuple(torch.from_numpy(row.labels) for row in rows),
            tuple(masks) if self._masks else (),
        )


def _mask_in_view(segmentation: Any, box: NDArray[np.float64], placed: Placed) -> dict[str, Any]:
    """The mask as RLE in the view: polygons move as points, pixels by the nearest."""
    height, width = placed.height, placed.width
    if isinstance(segmentation, dict):
        seen = nearest(rle.decode(segmentation), placed)
        return dict(rle.encode(np.asfortranarray(seen)))
    if segmentation is None:
        left, top, right, bottom = box.tolist()
        polygons = [[left, top, right, top, right, bottom, left, bottom]]
    else:
        polygons = [
            points_in_view(np.array(one, np.float64).reshape(-1, 2), placed).reshape(-1).tolist()
            for one in segmentation
        ]
    return dict(rle.merge(rle.frPyObjects(polygons, height, width)))
