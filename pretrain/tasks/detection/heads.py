"""torchvision's region proposals and RoI heads for many ranks: what they draw belongs to the sample, what they average
is averaged over the joined batch. Losses, matching and boxes are torchvision's own.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from pretrain.objectives.collectives import share_of_joined_mean
from pretrain.tasks.dense.sampling import KeyedSampler

# Ren et al., "Faster R-CNN", 2015, and Lin et al., "Feature Pyramid Networks", 2017, as torchvision's FasterRCNN and
# mmdetection's 1x schedules have them.
RPN_SAMPLES, RPN_POSITIVE = 256, 0.5
ROI_SAMPLES, ROI_POSITIVE = 512, 0.25
RATIOS = (0.5, 1.0, 2.0)
LEVELS = ["0", "1", "2", "3"]  # of the pyramid that RoIs are read from; "pool" above them is for proposals alone


class HeadSizes(NamedTuple):
    """width: channels of the pyramid. hidden: of the box head. anchors: side of each level's anchors, pixels."""

    width: int
    hidden: int
    anchors: tuple[int, ...]


class JoinedRegionProposals(RegionProposalNetwork):  # type: ignore[misc]
    """RegionProposalNetwork whose two losses are averaged over the sampled anchors of all ranks."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        losses = super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)
        assert isinstance(self.fg_bg_sampler, KeyedSampler)
        count = self.fg_bg_sampler.drawn
        return share_of_joined_mean(losses[0], count), share_of_joined_mean(losses[1], count)


class JoinedRoIHeads(RoIHeads):  # type: ignore[misc]
    """RoIHeads whose box losses are averaged over the sampled regions of all ranks, the mask loss over the positive
    ones.
    """

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        self._proposals = list(proposals)
        found: tuple[list[Tensor], list[Tensor]] = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        return found

    def subsample(self, labels: list[Tensor]) -> list[Tensor]:
        """Of the proposals that were just matched, the numbers of those to learn from."""
        assert isinstance(self.fg_bg_sampler, KeyedSampler)
        positive, negative = self.fg_bg_sampler(labels, self._proposals)
        return [torch.where(one | other)[0] for one, other in zip(positive, negative, strict=True)]

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        found: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
        found = super().select_training_samples(proposals, targets)
        labels = torch.cat(found[2])
        self._sampled, self._positive = labels.new_tensor(len(labels)), (labels > 0).sum()
        return found

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        result, losses = super().forward(features, proposals, image_shapes, targets)
        counts = {name: self._positive if name == "loss_mask" else self._sampled for name in losses}
        return result, {name: share_of_joined_mean(loss, counts[name]) for name, loss in losses.items()}


def region_proposals(sizes: HeadSizes) -> JoinedRegionProposals:
    anchors = AnchorGenerator(tuple((side,) for side in sizes.anchors), (RATIOS,) * len(sizes.anchors))
    network = JoinedRegionProposals(
        anchors,
        RPNHead(sizes.width, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=RPN_SAMPLES,
        positive_fraction=RPN_POSITIVE,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 1000, "testing": 1000},
        nms_thresh=0.7,
    )
    network.fg_bg_sampler = KeyedSampler(RPN_SAMPLES, RPN_POSITIVE, salt=0)
    return network


def roi_heads(sizes: HeadSizes, classes: int, *, masks: bool) -> JoinedRoIHeads:
    """classes: without the background, which is class 0 in here."""
    mask_parts: dict[str, nn.Module] = {}
    if masks:
        mask_parts = {
            "mask_roi_pool": MultiScaleRoIAlign(LEVELS, output_size=14, sampling_ratio=2),
            "mask_head": MaskRCNNHeads(sizes.width, (sizes.width,) * 4, dilation=1),
            "mask_predictor": MaskRCNNPredictor(sizes.width, sizes.width, classes + 1),
        }
    heads = JoinedRoIHeads(
        MultiScaleRoIAlign(LEVELS, output_size=7, sampling_ratio=2),
        TwoMLPHead(sizes.width * 7**2, sizes.hidden),
        FastRCNNPredictor(sizes.hidden, classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=ROI_SAMPLES,
        positive_fraction=ROI_POSITIVE,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        **mask_parts,
    )
    heads.fg_bg_sampler = KeyedSampler(ROI_SAMPLES, ROI_POSITIVE, salt=1)
    return heads
