"""Scores against pycocotools by hand and a direct confusion matrix; perfect predictions and empty ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_runs import tiny
from dense_sets import CATEGORIES, shapes, write_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data_pipeline.preparation import pack_coco
from data_pipeline.reading.dense import Annotation, parse_annotation, whole_pictures
from data_pipeline.reading.dense.label_maps import decode_label_map
from pretrain.evaluation.dense import coco
from pretrain.evaluation.dense.label_maps import ONCE, Windows, confusion, map_scores, score_label_maps, segment
from pretrain.evaluation.dense.objects import as_detections, find_objects, score_objects
from pretrain.evaluation.dense.views import Looks, padded, resized_size, windows
from pretrain.evaluation.encoding import inference
from pretrain.evaluation.results import value_of
from pretrain.tasks.dense.module import DenseModule, Instances
from pretrain.tasks.task import task_of

NAMES = tuple(CATEGORIES.values())


class Oracle(torch.nn.Module):
    """Says of each picture what its annotation says, in the order of the set; moved by `shift` pixels of the view."""

    whole_masks = False

    def __init__(self, folder: Path, *, empty: bool = False, shift: float = 0.0) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.known = [(parse_annotation(p.raw), p.pixels.shape[:2]) for p in whole_pictures(folder)]
        self.empty, self.shift, self.turn = empty, shift, 0

    def instances(self, images: torch.Tensor, sizes: list[tuple[int, int]]) -> list[Instances]:
        annotation, (height, width) = self.known[self.turn]
        self.turn += 1
        objects = [] if self.empty else annotation.objects
        scale = torch.tensor([sizes[0][1] / width, sizes[0][0] / height] * 2)
        boxes = torch.tensor([one["bbox"] for one in objects]).view(-1, 4)
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1) * scale + self.shift
        labels = torch.tensor([one["category"] for one in objects], dtype=torch.int64)
        return [Instances(corners, torch.linspace(0.9, 0.6, len(objects)), labels)]


def test_a_perfect_detector_scores_1_and_an_empty_one_0(coco_set: Path) -> None:
    config = tiny("detection", coco_set)
    for empty, value in ((False, 1.0), (True, 0.0)):
        result = score_objects(Oracle(coco_set, empty=empty), coco_set, config, classes=NAMES, masks=False)
        assert value_of(result, "box_AP") == pytest.approx(value, abs=1e-9)
        assert {row["value"] for row in result["per_class"].values()} == {value}


def test_classes_are_matched_by_name(coco_set: Path) -> None:
    """A model with more classes, in another order; an object of a class that the set lacks does not count."""
    oracle = Oracle(coco_set)
    for annotation, _ in oracle.known:
        for one in annotation.objects:
            one["category"] = {0: 2, 1: 0, 2: 1}[one["category"]]
    oracle.known[0][0].objects.append({"bbox": [1, 1, 20, 20], "category": 3, "iscrowd": 0, "area": 400})
    names = ("box", "bar", "disc", "cup")
    result = score_objects(oracle, coco_set, tiny("detection", coco_set), classes=names, masks=False)
    assert value_of(result, "box_AP") == pytest.approx(1.0)


def detections(folder: Path, seed: int, ids: list[int]) -> tuple[list[coco.Detection], list]:
    """Boxes and masks near the truth, some wrong, and false ones, from a seed."""
    random, found, known = np.random.default_rng(seed), [], []
    for picture in whole_pictures(folder):
        annotation = parse_annotation(picture.raw)
        known.append((annotation, picture.pixels.shape[:2]))
        _, expected = shapes(picture.position)
        for one, (_, mask, _) in zip(annotation.objects, expected, strict=True):
            for _ in range(2):
                shift = random.normal(0, 2, 4)
                left, top, width, height = one["bbox"]
                box = np.array([left, top, left + width, top + height]) + shift
                moved = np.roll(mask, random.integers(-3, 4, 2), (0, 1)) > 0
                category = ids[(one["category"] + (random.random() < 0.2)) % 3]
                found.append(coco.detection(annotation.image_id, category, box, random.random(), moved))
    return found, known


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_equals_pycocotools_on_the_file_itself(tmp_path: Path, kind: coco.Kind) -> None:
    images, file = write_coco(tmp_path, 8, lambda content: content["annotations"][1].update(iscrowd=1))
    pack_coco(images, tmp_path / "set", file, workers=1)
    found, known = detections(tmp_path / "set", 3, list(CATEGORIES))
    (tmp_path / "found.json").write_text(json.dumps(found))
    truth = COCO(str(file))
    plain = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), kind)
    plain.evaluate()
    plain.accumulate()
    plain.summarize()
    ours = coco.precision(coco.truth_of(known, list(CATEGORIES)), found, kind)
    expected = [value for value in plain.stats[:9] if value >= 0]
    assert 0.1 < expected[0] < 0.99
    assert [ours.stats[name] for name in coco.NAMES[:9] if name in ours.stats] == pytest.approx(expected, abs=1e-12)


def test_our_mask_rcnn_evaluated_by_our_path_equals_a_plain_script(coco_set: Path) -> None:
    """The same weights through torchvision's modules by hand, one picture at a time, and pycocotools."""
    from plain_dense import plain_detections

    torch.manual_seed(0)
    config = tiny("instance", coco_set)
    module = task_of(config).build(config.model, config.data, classes=3).eval()
    module.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        module.roi_heads.box_predictor.cls_score.weight.mul_(20)
    result = score_objects(module, coco_set, config, classes=NAMES, masks=True)
    found, ours, known, ids = [], [], [], list(CATEGORIES)
    with inference(module):
        for picture in whole_pictures(coco_set):
            annotation: Annotation = parse_annotation(picture.raw)
            known.append((annotation, picture.pixels.shape[:2]))
            found += plain_detections(module, picture.pixels, config, annotation.image_id, ids)
            objects = find_objects(module, picture.pixels, config.data)
            ours += as_detections(objects, annotation.image_id, dict(enumerate(ids)), masks=True)
    assert len(found) == len(ours) > 50
    for one, other in zip(ours, found, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3) and one["category_id"] == other["category_id"]
        assert one["segmentation"]["counts"] == other["segmentation"]["counts"]
    truth = coco.truth_of(known, list(CATEGORIES))
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        scored = COCOeval(truth, truth.loadRes(found), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
        assert value_of(result, f"{name}_AP") == pytest.approx(scored.stats[0], abs=1e-6)
        assert value_of(result, f"{name}_AR100") == pytest.approx(scored.stats[8], abs=1e-6)
        assert kind == "segm" or scored.stats[8] > 0


class Painter(torch.nn.Module):
    """Gives every pixel the class that its colour is nearest to; `flips` counts mirrored views."""

    def __init__(self) -> None:
        super().__init__()
        colours = torch.tensor([[220, 40, 40], [40, 200, 60], [50, 80, 230], [115, 115, 115]]) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.colours = torch.nn.Parameter((colours - mean) / std)
        self.seen: list[tuple[int, int]] = []

    def class_scores(self, images: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        self.seen += sizes
        assert images.shape[2] % 32 == images.shape[3] % 32 == 0
        return -(images[:, None] - self.colours[None, :, :, None, None]).square().sum(2)


@pytest.mark.parametrize("look", [ONCE, Looks((0.75, 1.0, 1.5), flip=True)])
@pytest.mark.parametrize("slide", [None, Windows(40, 24)])
def test_label_maps_are_scored_as_by_a_direct_confusion_matrix(
    label_set: Path, look: Looks, slide: Windows | None
) -> None:
    config, painter, names = tiny("semantic", label_set), Painter(), (*NAMES, "ground")
    result = score_label_maps(painter, label_set, config, classes=names, look=look, slide=slide)
    counts = np.zeros((4, 4), np.int64)
    with inference(painter):
        for picture in whole_pictures(label_set):
            found = segment(painter, picture.pixels, config.data, look=look, slide=slide)
            truth = decode_label_map(picture.raw)
            for row in range(truth.shape[0]):
                for column in range(truth.shape[1]):
                    if truth[row, column] != 255:
                        counts[truth[row, column], found[row, column]] += 1
    right = np.diag(counts)
    iou = right / (counts.sum(0) + counts.sum(1) - right)
    assert value_of(result, "mIoU") == pytest.approx(iou.mean(), abs=1e-12) and iou.min() > 0.5
    assert value_of(result, "mAcc") == pytest.approx((right / counts.sum(1)).mean(), abs=1e-12)
    assert [row["value"] for row in result["per_class"].values()] == pytest.approx(iou.tolist(), abs=1e-12)
    if slide is not None:
        assert max(max(size) for size in painter.seen) <= 40


def test_a_perfect_map_scores_1_and_a_wrong_one_0() -> None:
    truth = np.random.default_rng(0).integers(0, 3, (50, 40))
    truth[:5] = 255
    assert map_scores(confusion(truth, np.where(truth == 255, 0, truth), 3)).mean_iou == 1.0
    wrong = map_scores(confusion(truth, (truth + 1) % 3, 3))
    assert wrong.mean_iou == wrong.mean_accuracy == wrong.pixel_accuracy == 0.0
    two = map_scores(confusion(np.zeros((2, 2), int), np.zeros((2, 2), int), 3))
    assert two.mean_iou == 1.0, "classes that are nowhere do not count"


@pytest.mark.parametrize(("height", "width"), [(30, 90), (64, 64), (65, 129), (100, 41)])
def test_windows_cover_every_pixel(height: int, width: int) -> None:
    seen = np.zeros((height, width), int)
    for top, left, bottom, right in windows(height, width, 64, 43):
        assert bottom - top == min(64, height) and right - left == min(64, width)
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1


def test_a_picture_is_found_at_its_own_size(coco_set: Path) -> None:
    config = tiny("detection", coco_set)
    picture = next(whole_pictures(coco_set))
    oracle = Oracle(coco_set)
    with inference(oracle):
        found = find_objects(oracle, picture.pixels, config.data)
    expected = [one["bbox"] for one in oracle.known[0][0].objects]
    boxes = np.concatenate([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], 1)
    assert boxes == pytest.approx(np.array(expected, float), abs=1e-3)
    assert resized_size(480, 640, config.data.rectangle) == (64, 85) and padded((64, 85)) == [64, 96]
    assert isinstance(task_of(config).build(config.model, config.data, classes=3), DenseModule)
