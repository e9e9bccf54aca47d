"""A set, or single pictures, through a module that finds objects."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.models.detection.roi_heads import paste_masks_in_image

from data_pipeline.errors import UserError
from data_pipeline.format import open_set
from data_pipeline.reading.config import DataConfig
from data_pipeline.reading.decode.pixels import Pixels
from data_pipeline.reading.dense import Annotation, parse_annotation, whole_pictures
from pretrain.configuration.schema import RunConfig
from pretrain.evaluation.dense import coco
from pretrain.evaluation.dense.drawing import beside_truth, drawn_objects
from pretrain.evaluation.dense.views import view_of
from pretrain.evaluation.encoding import Evaluated, device_of, inference
from pretrain.evaluation.results import Result
from pretrain.evaluation.sets import describe_set
from pretrain.tasks.dense.module import Instances, PredictsInstances

SHOWN = 6  # pictures with their predictions in a result
DRAWN = 0.5  # score from which on a prediction is drawn
TITLES = {
    "AP": "AP, IoU .5 to .95", "AP50": "AP at IoU .5", "AP75": "AP at IoU .75", "AP_small": "AP, small objects",
    "AP_medium": "AP, medium objects", "AP_large": "AP, large objects", "AR100": "recall of 100 detections",
}  # fmt: skip


class Detector(Evaluated, PredictsInstances, Protocol):
    """A torch module that finds objects."""


class Found(NamedTuple):
    """Objects of one picture in its own pixels, best first. masks: bool [H, W] each, none of a detector."""

    boxes: NDArray[np.float64]  # [n, 4] left, top, right, bottom
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    masks: list[NDArray[np.bool_]] | None


def find_objects(module: Detector, pixels: Pixels, data: DataConfig) -> Found:
    """pixels: uint8 [H, W, 3]. Call within `inference`."""
    view = view_of(pixels, data, device_of(module))
    (found,) = module.instances(view.images, [view.size])
    height, width = pixels.shape[:2]
    scale = torch.tensor([width / view.size[1], height / view.size[0]] * 2, device=found.boxes.device)
    boxes = (found.boxes * scale).float()
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    return Found(
        boxes.double().cpu().numpy(),
        found.scores.double().cpu().numpy(),
        found.labels.cpu().numpy(),
        _whole_masks(module, found, boxes, (height, width), view.size),
    )


def _whole_masks(
    module: Detector, found: Instances, boxes: torch.Tensor, size: tuple[int, int], seen: tuple[int, int]
) -> list[NDArray[np.bool_]] | None:
    if found.masks is None:
        return None
    masks = []
    for mask, box in zip(found.masks.float(), boxes, strict=True):  # one at a time: a hundred are large
        if module.whole_masks:
            cut = mask[None, None, : seen[0], : seen[1]]
            whole = torch.nn.functional.interpolate(cut, size, mode="bilinear", align_corners=False)[0, 0]
        else:
            whole = paste_masks_in_image(mask[None, None], box[None], size)[0, 0]
        masks.append((whole > 0.5).cpu().numpy())
    return masks


def score_objects(
    module: Detector, set_folder: Path | str, config: RunConfig, *, classes: Sequence[str] | None, masks: bool
) -> Result:
    """Box AP, and with `masks` mask AP, on a set packed from COCO's objects.

    classes: names of the module's labels. The set's categories are looked up among them by name; what the module finds
    of other classes does not count. Raises UserError where the set has no objects or other classes.
    """
    about, manifest = describe_set(set_folder), open_set(set_folder)
    ids = category_ids(manifest.about, len(manifest.classes or ()))
    rows = about.rows_in(classes or ())[:-1].tolist()  # of each of the set's categories among the module's labels
    category = {row: ids[number] for number, row in enumerate(rows)}
    truth: list[tuple[Annotation, tuple[int, int]]] = []
    detections: list[coco.Detection] = []
    examples: list[dict[str, str]] = []
    names = list(classes or ())
    with inference(module):
        for picture in whole_pictures(set_folder):
            annotation = parse_annotation(picture.raw)
            found = find_objects(module, picture.pixels, config.data)
            truth.append((annotation, picture.pixels.shape[:2]))
            detections += list(as_detections(found, annotation.image_id, category, masks=masks))
            if len(examples) < SHOWN:
                known = [(one["bbox"], (about.distinct or ())[one["category"]]) for one in annotation.objects]
                drawn = drawn_objects(picture.pixels, found, names, DRAWN)
                examples.append(beside_truth(picture.pixels, drawn, known))
    base = coco.truth_of(truth, ids)
    if not base.getAnnIds(iscrowd=False):
        raise UserError(f"{set_folder}: none of its pictures has an object, so nothing can be scored")
    result: Result = {"title": "Objects", "set": about.name, "samples": len(truth), "classes": len(ids), "scores": []}
    kinds: list[tuple[coco.Kind, str, str]] = [("bbox", "box", "boxes")]
    if masks:
        kinds.append(("segm", "mask", "masks"))
    for kind, name, title in kinds:
        scored = coco.precision(base, detections, kind)
        result["scores"] += [
            {"name": f"{name}_{key}", "title": f"{title}: {TITLES[key]}", "value": value, "chance": 0.0, "beside": {}}
            for key, value in scored.stats.items()
            if key in TITLES
        ]
        result["per_class"] = {
            (about.distinct or ())[number]: {"value": value, "samples": count}
            for number, (value, count) in scored.per_class.items()
        }
    return {**result, "pictures": examples, **about.credit}


def as_detections(found: Found, image_id: int, category: dict[int, int], *, masks: bool) -> Iterator[coco.Detection]:
    """category: COCO's id by the module's label; objects of other labels are left out."""
    for number, label in enumerate(found.labels.tolist()):
        if label in category:
            mask = found.masks[number] if masks and found.masks is not None else None
            yield coco.detection(image_id, category[label], found.boxes[number], found.scores[number], mask)


def category_ids(about: object, count: int) -> list[int]:
    """COCO's ids of the categories of a set, by number; 1, 2, ... where it does not say."""
    said = about.get("category_ids") if isinstance(about, dict) else None
    return [int(one) for one in str(said).split(",")] if said else list(range(1, count + 1))
