"""Deformable DETR (Zhu et al., 2021), two-stage with box refinement, over InternImage: batch in, losses out.

    views -> image -> stages 2 to 4 and one below -> deformable encoder -> proposals -> decoder -> class, box

Of transformers' detectors this is nearest to DINO (Zhang et al., 2022), which InternImage-H was published with: DINO is
this model with denoising queries, mixed query selection and gradients through the refinement. RT-DETR and D-FINE have
denoising, but draw it unkeyed and by the rank's own maximum of objects, and take three levels. transformers puts no
loss on the encoder's proposals, which then would not learn; here they have Deformable DETR's own: class-less focal, L1
and GIoU.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from data_pipeline.reading import Targets
from data_pipeline.reading.batch import Batch
from pretrain.models import InternImage
from pretrain.models.randomness import drawing_from
from pretrain.objectives.collectives import summed, world_size
from pretrain.objectives.keys import StepKeys, sample_keys
from pretrain.objectives.metrics import Metrics
from pretrain.tasks.dense.borrowed import BorrowedBackbone, costs_beside_image, placeholder_backbone
from pretrain.tasks.dense.fp32 import compute_in_fp32
from pretrain.tasks.dense.module import DenseModule, Instances
from pretrain.tasks.detection.regions import objects_of
from pretrain.tasks.module import LossOutput, TeacherTargets

DETECTIONS = 300  # of a picture; COCO's score takes the best 100
STAGES = (1, 2, 3)  # strides 8, 16, 32


class QueryDetector(DenseModule):
    """settings: of DeformableDetrConfig, beside the backbone and the classes. Dropout is 0: it would draw unkeyed."""

    whole_masks = False

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
        fixed = {"two_stage": True, "with_box_refine": True, "disable_custom_kernels": True}
        dropout = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
        settings = {**settings, **fixed, **dropout, "num_labels": classes}
        config = DeformableDetrConfig(backbone_config=placeholder_backbone(image, STAGES), **settings)
        whole = DeformableDetrForObjectDetection(config)
        # The heads of the whole model are those of its decoder under a second name.
        self.net = whole.model
        self.net.backbone.model = BorrowedBackbone(image, STAGES)
        _initialize(self.net.decoder)
        compute_in_fp32(self.net)
        self.criterion = DeformableDetrImageLoss(  # type: ignore[no-untyped-call]
            DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost),
            classes,
            config.focal_alpha,
            ["labels", "boxes"],
        )
        self.weights = {
            "loss_ce": 2.0,  # Deformable DETR's; transformers' loss has 1
            "loss_bbox": float(config.bbox_loss_coefficient),
            "loss_giou": float(config.giou_loss_coefficient),
        }

    def forward(
        self,
        batch: Batch[Targets],
        keys: StepKeys,
        teacher_targets: TeacherTargets | None = None,
        measure: bool = True,
    ) -> LossOutput:
        wanted = objects_of(batch)
        images, sizes = self.pictures(batch, wanted)
        targets = [
            {"class_labels": labels, "boxes": _shares(boxes, size)}
            for boxes, labels, size in zip(wanted.boxes, wanted.labels, sizes, strict=True)
        ]
        with drawing_from(sample_keys(keys, batch.positions)):
            *layers, proposals = self._outputs(images, sizes)
        classless = [{**target, "class_labels": torch.zeros_like(target["class_labels"])} for target in targets]
        scale = _joined(sum(map(len, wanted.labels)), images.device)
        parts: dict[str, Tensor] = {}
        for output, truth in [*((layer, targets) for layer in layers), (proposals, classless)]:
            found = self.criterion(output, truth)
            for theirs, name in (("loss_ce", "class"), ("loss_bbox", "box"), ("loss_giou", "giou")):
                loss = self.weights[theirs] * scale * found[theirs]
                parts[name] = parts[name] + loss if name in parts else loss
        total = torch.stack(list(parts.values())).sum()
        metrics = Metrics(measure)
        metrics.add("objects", lambda: total.new_tensor(sum(map(len, wanted.labels)) / len(sizes)))
        return LossOutput(total, {name: loss.detach() for name, loss in parts.items()}, metrics.values)

    def instances(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        *_, last, _ = self._outputs(images, sizes)
        found = []
        for logits, boxes, (height, width) in zip(last["logits"], last["pred_boxes"], sizes, strict=True):
            count = logits.shape[1]
            scores, places = logits.sigmoid().flatten().topk(min(DETECTIONS, logits.numel()))
            corners = box_convert(boxes[places // count], "cxcywh", "xyxy")
            scale = corners.new_tensor([width, height, width, height])
            found.append(Instances(corners * scale, scores, places % count))
        return found

    def head_costs(self, side: int) -> tuple[float, float]:
        """Encoder, proposals and decoder over the picture. The losses, of a few boxes, are left out."""
        backbone = self.net.backbone.model
        assert isinstance(backbone, BorrowedBackbone)
        return costs_beside_image(
            self.net, backbone, self.widths, side, lambda pictures: self._outputs(pictures, [(side, side)])
        )

    def _outputs(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Logits and boxes (centre and size, as shares of the picture) of each decoder layer, then of the proposals."""
        mask = torch.zeros(len(images), *images.shape[2:], dtype=torch.int64, device=images.device)
        for row, (height, width) in enumerate(sizes):
            mask[row, :height, :width] = 1
        out = self.net(images, pixel_mask=mask)
        outputs = []
        before = out.init_reference_points
        for layer in range(out.intermediate_hidden_states.shape[1]):
            hidden = out.intermediate_hidden_states[:, layer]
            moved = self.net.decoder.bbox_embed[layer](hidden) + _inverse_sigmoid(before)
            outputs.append({"logits": self.net.decoder.class_embed[layer](hidden), "pred_boxes": moved.sigmoid()})
            before = out.intermediate_reference_points[:, layer]
        boxes = out.enc_outputs_coord_logits.sigmoid()
        return [*outputs, {"logits": out.enc_outputs_class, "pred_boxes": boxes}]


@torch.no_grad()
def _initialize(decoder: torch.nn.Module) -> None:
    """Deformable DETR's first values of its heads: every class at a probability of .01, boxes where they were."""
    for classes, boxes in zip(decoder.class_embed, decoder.bbox_embed, strict=True):  # type: ignore[arg-type]
        torch.nn.init.constant_(classes.bias, -math.log(99))
        torch.nn.init.zeros_(boxes.layers[-1].weight)
        torch.nn.init.zeros_(boxes.layers[-1].bias)


def _shares(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (left, top, right, bottom) in pixels -> centre and size as shares of the picture."""
    height, width = size
    shares: Tensor = box_convert(boxes, "xyxy", "cxcywh") / boxes.new_tensor([width, height, width, height])
    return shares


def _joined(count: int, device: torch.device) -> Tensor:
    """What turns sums over a rank's `count` objects, divided by them, into its share of the joined batch's."""
    mine = torch.tensor(float(count), device=device)
    return mine.clamp_min(1) * world_size() / summed(mine).clamp_min(1)


def _inverse_sigmoid(x: Tensor, least: float = 1e-5) -> Tensor:
    x = x.clamp(0, 1)
    odds: Tensor = x.clamp_min(least) / (1 - x).clamp_min(least)
    return odds.log()
