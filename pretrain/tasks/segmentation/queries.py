"""Mask2Former (Cheng et al., "Masked-attention Mask Transformer", 2022) over InternImage: batch in, losses out.

    views -> image -> four stages -> pixel decoder -> masked attention -> queries: a class and a mask each

Trained on objects, or on label maps, of which each class in a picture is one mask. Model and losses are transformers'.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from data_pipeline.reading import Targets
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.dense import IGNORED, LabelMapTargets, ObjectTargets
from pretrain.models import InternImage
from pretrain.models.randomness import drawing_from
from pretrain.objectives.keys import StepKeys, sample_keys
from pretrain.objectives.metrics import Metrics
from pretrain.tasks.dense.borrowed import BorrowedBackbone, costs_beside_image, placeholder_backbone
from pretrain.tasks.dense.fp32 import compute_in_fp32
from pretrain.tasks.dense.module import DenseModule, Instances
from pretrain.tasks.module import LossOutput, TeacherTargets
from pretrain.tasks.segmentation.criterion import JoinedMask2FormerLoss
from pretrain.tasks.segmentation.pyramid import fitted

DETECTIONS = 100  # objects of a picture


class QueryModule(DenseModule):
    """settings: of Mask2FormerConfig, beside the backbone and the classes."""

    whole_masks = True

    def __init__(
        self,
        image: InternImage,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        classes: int,
        settings: dict[str, Any],
        frozen_stages: int = 0,
    ) -> None:
        super().__init__(image, mean, std, frozen_stages)
        settings = {**settings, "num_labels": classes}
        config = Mask2FormerConfig(backbone_config=placeholder_backbone(image), **settings)
        self.net = Mask2FormerForUniversalSegmentation(config)
        self.net.model.pixel_level_module.encoder = BorrowedBackbone(image)
        self.net.criterion = JoinedMask2FormerLoss(config, self.net.weight_dict)
        compute_in_fp32(self.net)

    def forward(
        self,
        batch: Batch[Targets],
        keys: StepKeys,
        teacher_targets: TeacherTargets | None = None,
        measure: bool = True,
    ) -> LossOutput:
        targets = batch.targets
        assert isinstance(targets, ObjectTargets | LabelMapTargets), "a task's module is given the task's own targets"
        images, _ = self.pictures(batch, targets)
        masks, labels = masks_of(targets, images.shape[2], images.shape[3])
        with drawing_from(sample_keys(keys, batch.positions)):
            out = self.net(images, output_auxiliary_logits=True)
            predicted = out.masks_queries_logits, out.class_queries_logits
            losses = self.net.get_loss_dict(*predicted, masks, labels, out.auxiliary_logits)  # type: ignore[arg-type]
        total = torch.stack(list(losses.values())).sum()
        parts = {
            name: torch.stack([loss for key, loss in losses.items() if key.startswith(f"loss_{theirs}")]).sum().detach()
            for name, theirs in (("class", "cross_entropy"), ("mask", "mask"), ("dice", "dice"))
        }
        metrics = Metrics(measure)
        metrics.add("objects", lambda: total.new_tensor(sum(map(len, labels)) / len(labels)))
        return LossOutput(total, parts, metrics.values)

    def head_costs(self, side: int) -> tuple[float, float]:
        """Pixel decoder and queries over the picture. The losses, at points of the masks, are left out."""
        backbone = self.net.model.pixel_level_module.encoder
        assert isinstance(backbone, BorrowedBackbone)
        return costs_beside_image(
            self.net, backbone, self.widths, side, lambda pictures: self.net(pictures, output_auxiliary_logits=True)
        )

    def class_scores(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Each query's mask, weighted by its probability of a class (Cheng et al. 2021, section 3.4)."""
        classes, masks = self._queries(images)
        return torch.einsum("bqc,bqhw->bchw", classes, masks)

    def instances(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """The best pairs of query and class; the score is the class's times the mask's own mean (Cheng et al. 2022)."""
        classes, masks = self._queries(images)
        return [
            _best(one, mask[:, :height, :width])
            for one, mask, (height, width) in zip(classes, masks, sizes, strict=True)
        ]

    def _queries(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities: [B, queries, classes] without "no object", and masks [B, queries, H, W]."""
        out = self.net(images)
        masks = F.interpolate(out.masks_queries_logits, images.shape[2:], mode="bilinear", align_corners=False)
        return out.class_queries_logits.softmax(-1)[..., :-1], masks.sigmoid()


def masks_of(targets: ObjectTargets | LabelMapTargets, height: int, width: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of each picture: masks float32 [n, height, width] and their classes int64 [n]."""
    if isinstance(targets, ObjectTargets):
        padded = [
            F.pad(masks.float(), (0, width - masks.shape[2], 0, height - masks.shape[1])) for masks in targets.masks
        ]
        return padded, list(targets.labels)
    masks, labels = [], []
    for one in fitted(targets.maps, height, width):
        found = one.unique()
        found = found[found != IGNORED]
        masks.append((one == found[:, None, None]).float())
        labels.append(found)
    return masks, labels


def _best(classes: Tensor, masks: Tensor) -> Instances:
    """classes: [queries, C]. masks: [queries, h, w]."""
    count = classes.shape[1]
    scores, places = classes.flatten().topk(min(DETECTIONS, classes.numel()))
    queries, labels = places // count, places % count
    chosen = masks[queries]
    inside = chosen > 0.5
    scores = scores * (chosen * inside).sum((1, 2)) / inside.sum((1, 2)).clamp_min(1)
    seen = inside.any(2).any(1)
    scores, order = scores[seen].sort(descending=True, stable=True)
    inside, chosen, labels = inside[seen][order], chosen[seen][order], labels[seen][order]
    return Instances(_boxes(inside), scores, labels, chosen)


def _boxes(inside: Tensor) -> Tensor:
    """The box [n, 4] around each mask bool [n, h, w], none of which is empty."""
    rows, columns = inside.any(2).int(), inside.any(1).int()
    height, width = rows.shape[1], columns.shape[1]
    edges = [
        columns.argmax(1), rows.argmax(1), width - columns.flip(1).argmax(1), height - rows.flip(1).argmax(1)
    ]  # fmt: skip
    return torch.stack(edges, 1).float()
