"""Each task learns eight pictures by heart: boxes, masks against the ceiling that 28 x 28 masks have, label maps.

The heads are wider than those of the other tests: among 16 channels behind a ReLU it happens that none is above zero
where a rare class is, and then nothing is learned of that class, whatever the image model is.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_runs import LABEL_MAPS, MASK2FORMER, tiny
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

from data_pipeline.reading.dense import parse_annotation, whole_pictures
from data_pipeline.reading.dense.objects import outline_mask
from pretrain.configuration import RunConfig, parse_config
from pretrain.evaluation import evaluate
from pretrain.evaluation.dense import coco
from pretrain.finetuning import finetune

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]
STEPS_AND_LR = {
    "semantic": (150, 2e-3),
    "instance": (400, 2e-3),
    "query_detection": (800, 1e-3),
    "query_instance": (1200, 1e-3),
    "query_segmentation": (800, 1e-3),
}

WIDER: dict[str, dict[str, Any]] = {
    "semantic": {"width": 64, "auxiliary_width": 32},
    "query_instance": {"mask2former": {**MASK2FORMER, "width": 64, "hidden": 64, "encoder_hidden": 64, "points": 512}},
}


def memorizing(task: str, folder: Path) -> RunConfig:
    """All eight pictures a step, whole. Those with label maps are cut to squares, so that no view is padded: a padded
    one has other means over the whole picture, which UperNet looks at, than the picture that is scored.
    """
    steps, lr = STEPS_AND_LR[task]
    raw = tiny(task, folder, steps=steps).model_dump(mode="json")
    side = 96 if task in LABEL_MAPS else 128
    raw["data"]["rectangle"] = {"shorter": [side], "longer": 2 * side, "scale": [1.0, 1.0]}
    raw["task"] |= WIDER.get(task, {})
    raw["data"] |= {"image_size": side if task in LABEL_MAPS else 2 * side, "augmentation": {"flip": 0.0}}
    raw["model"]["overrides"] |= {"drop_path_rate": 0.0}
    raw["optimizer"] |= {"lr": lr, "eps": 1e-8, "layer_decay": 1.0, "weight_decay": 0.0, "offset_lr_scale": 1.0}
    raw["schedule"] |= {"warmup_steps": steps // 20}
    raw["training"] |= {"batch_size": 8, "zero_stage": 0, "log_every": 50, "ema": {"decay": 0.95}}
    return parse_config(raw)


def ceiling(folder: Path) -> float:
    """Mask AP of perfect boxes with the truth's own masks at 28 x 28, pasted back as Mask R-CNN pastes its own."""
    known, found = [], []
    for picture in whole_pictures(folder):
        annotation, (height, width) = parse_annotation(picture.raw), picture.pixels.shape[:2]
        known.append((annotation, (height, width)))
        for one in annotation.objects:
            left, top, wide, tall = one["bbox"]
            box = torch.tensor([[left, top, left + wide, top + tall]], dtype=torch.float32)
            mask = torch.from_numpy(outline_mask(one["segmentation"], height, width))[None]
            small = project_masks_on_boxes(mask, box, torch.zeros(1, dtype=torch.int64), 28)
            whole = paste_masks_in_image(small[:, None], box, (height, width))[0, 0] > 0.5
            found.append(
                coco.detection(annotation.image_id, one["category"] + 1, box[0].tolist(), 1.0, np.array(whole))
            )
    return coco.precision(coco.truth_of(known, [1, 2, 3]), found, "segm").stats["AP"]


@pytest.mark.parametrize("task", STEPS_AND_LR)
def test_eight_pictures_are_learned_by_heart(task: str, coco_set: Path, label_set: Path, tmp_path: Path) -> None:
    folder = label_set if task in LABEL_MAPS else coco_set
    assert finetune(memorizing(task, folder), output=tmp_path / "run") == 0
    (result,) = evaluate(tmp_path / "run", folder, untrained=False).values()
    scores = {entry["name"]: entry["value"] for entry in result["scores"]}
    print(task, scores, result["per_class"], ceiling(folder) if task not in LABEL_MAPS else "")
    if task in LABEL_MAPS:
        assert scores["mIoU"] > 0.95
        return
    assert scores["box_AP50"] > 0.95
    if task in ("instance", "query_instance"):
        assert scores["mask_AP"] >= 0.85 * ceiling(folder)
