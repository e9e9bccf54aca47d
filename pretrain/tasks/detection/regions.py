"""Faster R-CNN, and with masks Mask R-CNN, over InternImage as one module: batch in, losses out.

    views -> image -> four stages -> FPN -+- RPN ------ objectness, box
                                          +- RoI heads - class, box, mask

torchvision's parts, without its GeneralizedRCNN, which resizes pictures by itself (Ren et al. 2015, He et al. 2017).
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from data_pipeline.reading import Targets
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.dense import ObjectTargets
from pretrain.models import InternImage
from pretrain.models.randomness import drawing_from
from pretrain.objectives.keys import StepKeys, sample_keys
from pretrain.objectives.metrics import Metrics
from pretrain.tasks.dense.costs import head_costs, stage_maps
from pretrain.tasks.dense.fp32 import compute_in_fp32
from pretrain.tasks.dense.module import DenseModule, Instances
from pretrain.tasks.detection.heads import ROI_POSITIVE, ROI_SAMPLES, HeadSizes, region_proposals, roi_heads
from pretrain.tasks.module import LossOutput, TeacherTargets

LOSSES = {  # torchvision's names -> those in the log
    "loss_objectness": "rpn_class",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}


class RegionModule(DenseModule):
    """Regions are proposed, then classified, moved and, with `masks`, cut out."""

    whole_masks = False

    def __init__(
        self,
        image: InternImage,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        classes: int,
        masks: bool,
        sizes: HeadSizes,
        frozen_stages: int = 0,
    ) -> None:
        super().__init__(image, mean, std, frozen_stages)
        self.masks, self.sizes = masks, sizes
        self.fpn = FeaturePyramidNetwork(self.widths, sizes.width, LastLevelMaxPool())
        self.rpn = region_proposals(sizes)
        self.roi_heads = roi_heads(sizes, classes, masks=masks)
        for head in (self.fpn, self.rpn, self.roi_heads):
            compute_in_fp32(head)

    def forward(
        self,
        batch: Batch[Targets],
        keys: StepKeys,
        teacher_targets: TeacherTargets | None = None,
        measure: bool = True,
    ) -> LossOutput:
        wanted = objects_of(batch)
        images, sizes = self.pictures(batch, wanted)
        names = ("boxes", "labels", "masks") if self.masks else ("boxes", "labels")
        columns = [wanted.boxes, [labels + 1 for labels in wanted.labels], wanted.masks]
        targets = [dict(zip(names, row, strict=False)) for row in zip(*columns[: len(names)], strict=True)]
        with drawing_from(sample_keys(keys, batch.positions)):
            _, losses = self._detect(images, sizes, targets)
        total = torch.stack(list(losses.values())).sum()
        metrics = Metrics(measure)
        metrics.add("objects", lambda: total.new_tensor(sum(map(len, wanted.labels)) / len(sizes)))
        return LossOutput(total, {LOSSES[name]: loss.detach() for name, loss in losses.items()}, metrics.values)

    def head_costs(self, side: int) -> tuple[float, float]:
        """The pyramid and the proposals' head over the picture, the others over as many regions as training samples."""
        maps, heads = stage_maps(self.widths, side), self.roi_heads
        width = self.sizes.width
        regions = torch.empty(ROI_SAMPLES, width, 7, 7, device="meta", requires_grad=True)
        positive = torch.empty(int(ROI_SAMPLES * ROI_POSITIVE), width, 14, 14, device="meta", requires_grad=True)

        def call() -> None:
            self.rpn.head(list(self.fpn(OrderedDict((str(level), one) for level, one in enumerate(maps))).values()))
            heads.box_predictor(heads.box_head(regions))
            if self.masks:
                heads.mask_predictor(heads.mask_head(positive))

        return head_costs(call, (self.fpn, self.rpn, heads), maps)

    def instances(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        found, _ = self._detect(images, list(sizes), None)
        return [
            Instances(one["boxes"], one["scores"], one["labels"] - 1, one["masks"][:, 0] if self.masks else None)
            for one in found
        ]

    def _detect(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        maps = self.fpn(OrderedDict((str(level), stage) for level, stage in enumerate(self.features(images))))
        proposals, losses = self.rpn(ImageList(images, sizes), maps, targets)
        found, more = self.roi_heads(maps, proposals, sizes, targets)
        return found, losses | more


def objects_of(batch: Batch[Targets]) -> ObjectTargets:
    """The objects of a batch that a reader of such targets made."""
    assert isinstance(batch.targets, ObjectTargets), "a task's module is given batches with the task's own targets"
    return batch.targets
