"""Truth and detections in COCO's form, and the average precision that pycocotools makes of them."""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data_pipeline.reading.dense import Annotation

Kind = Literal["bbox", "segm"]
Detection = dict[str, Any]  # COCO's result: image_id, category_id, bbox, score, and segmentation where there are masks
# COCOeval.stats, in its order.
NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium")


class Precision(NamedTuple):
    """stats: by the names above, 0 to 1; those that the set has no object for are left out. per_class: AP by category
    number, and how many objects it has.
    """

    stats: dict[str, float]
    per_class: dict[int, tuple[float, int]]


def truth_of(pictures: Iterable[tuple[Annotation, tuple[int, int]]], categories: Sequence[int]) -> COCO:
    """COCO's data base of annotations and the (height, width) of their pictures. categories: COCO's id by number."""
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for annotation, (height, width) in pictures:
        images.append({"id": annotation.image_id, "height": height, "width": width})
        for one in annotation.objects:
            entry = {name: one[name] for name in ("bbox", "area", "iscrowd")}
            left, top, wide, tall = one["bbox"]
            box = [[left, top, left + wide, top, left + wide, top + tall, left, top + tall]]
            objects.append(
                {
                    **entry,
                    "id": len(objects) + 1,
                    "image_id": annotation.image_id,
                    "category_id": categories[one["category"]],
                    "segmentation": one.get("segmentation", box),
                }
            )
    truth = COCO()
    truth.dataset = {
        "images": images,
        "annotations": objects,
        "categories": [{"id": category, "name": str(category)} for category in categories],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def precision(truth: COCO, detections: Sequence[Detection], kind: Kind) -> Precision:
    """Average precision over IoU .5 to .95. Without a single detection every score is 0."""
    categories = sorted(truth.getCatIds())
    counts = {
        number: sum(not one["iscrowd"] for one in truth.loadAnns(truth.getAnnIds(catIds=[category])))
        for number, category in enumerate(categories)
    }
    if not detections:
        return Precision(dict.fromkeys(NAMES, 0.0), {n: (0.0, count) for n, count in counts.items() if count})
    with contextlib.redirect_stdout(io.StringIO()):
        scored = COCOeval(truth, truth.loadRes([dict(one) for one in detections]), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    stats = {name: float(value) for name, value in zip(NAMES, scored.stats, strict=False) if value >= 0}
    found = scored.eval["precision"][:, :, :, 0, -1]  # IoU, recall, category; all sizes, most detections
    per_class = {number: (float(np.mean(found[:, :, number])), count) for number, count in counts.items() if count}
    return Precision(stats, per_class)


def encoded(mask: np.ndarray) -> dict[str, Any]:
    """A mask [H, W] as RLE that JSON can hold."""
    coded: Mapping[str, Any] = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(coded["size"]), "counts": coded["counts"].decode("ascii")}


def detection(image_id: int, category: int, box: Sequence[float], score: float, mask: np.ndarray | None) -> Detection:
    """box: left, top, right, bottom in pixels of the whole picture. mask: bool [H, W] of it."""
    left, top, right, bottom = (float(value) for value in box)
    found: Detection = {"image_id": image_id, "category_id": category}
    found |= {"bbox": [left, top, right - left, bottom - top], "score": float(score)}
    return found if mask is None else found | {"segmentation": encoded(mask)}
