"""UperNet (Xiao et al., "Unified Perceptual Parsing", 2018) over InternImage: batch in, loss out.

    views -> image -> four stages -+- pyramid pooling, FPN -> logits, stride 4 -> cross-entropy
                                   +- stage 3 -> convolution -> logits, stride 16 -> cross-entropy, weighted

The heads are transformers'. Its losses are means of a rank's own pixels and its BatchNorms see a rank's own pictures;
here both are those of the joined batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from data_pipeline.reading import Targets
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.dense import IGNORED, LabelMapTargets
from pretrain.models import InternImage
from pretrain.models.randomness import drawing_from
from pretrain.objectives.collectives import global_mean, summed
from pretrain.objectives.keys import StepKeys, sample_keys
from pretrain.objectives.metrics import Metrics
from pretrain.tasks.dense.costs import head_costs, stage_maps
from pretrain.tasks.dense.fp32 import compute_in_fp32
from pretrain.tasks.dense.module import DenseModule
from pretrain.tasks.module import LossOutput, TeacherTargets


class PyramidModule(DenseModule):
    """classes: of the pixels. width, auxiliary_width: channels of the two heads. auxiliary_weight: 0 leaves the second
    out.
    """

    def __init__(
        self,
        image: InternImage,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        classes: int,
        width: int,
        auxiliary_width: int,
        auxiliary_weight: float,
        frozen_stages: int = 0,
    ) -> None:
        super().__init__(image, mean, std, frozen_stages)
        self.auxiliary_weight = auxiliary_weight
        settings: dict[str, Any] = {"hidden_size": width, "num_labels": classes, "auxiliary_channels": auxiliary_width}
        config = UperNetConfig(**settings, auxiliary_in_channels=None)
        self.head = UperNetHead(config, self.widths)  # type: ignore[no-untyped-call]
        self.auxiliary_head = UperNetFCNHead(config, self.widths) if auxiliary_weight else None
        for head in (self.head, self.auxiliary_head):
            if head is not None:
                _initialize(head)
                compute_in_fp32(head)

    def forward(
        self,
        batch: Batch[Targets],
        keys: StepKeys,
        teacher_targets: TeacherTargets | None = None,
        measure: bool = True,
    ) -> LossOutput:
        wanted = label_maps_of(batch)
        images, _ = self.pictures(batch, wanted)
        maps = fitted(wanted.maps, images.shape[2], images.shape[3])
        with drawing_from(sample_keys(keys, batch.positions)):
            features = self.features(images)
        logits = self.head(features)
        losses = {"pixels": _pixel_loss(logits, maps)}
        total = losses["pixels"]
        if self.auxiliary_head is not None:
            losses["auxiliary"] = _pixel_loss(self.auxiliary_head(features), maps)
            total = total + self.auxiliary_weight * losses["auxiliary"]
        metrics = Metrics(measure)
        metrics.add("pixels/accuracy", lambda: _accuracy(logits, maps))
        return LossOutput(total, {name: loss.detach() for name, loss in losses.items()}, metrics.values)

    def head_costs(self, side: int) -> tuple[float, float]:
        maps = stage_maps(self.widths, side)
        labels = torch.zeros(1, side, side, dtype=torch.int64, device="meta")
        heads = [head for head in (self.head, self.auxiliary_head) if head is not None]

        def call() -> None:
            for head in heads:
                F.cross_entropy(_enlarged(head(maps), labels.shape[1:]), labels)

        return head_costs(call, heads, maps)

    def class_scores(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Probabilities [B, classes, H, W]."""
        return _enlarged(self.head(self.features(images)), images.shape[2:]).softmax(1)


def label_maps_of(batch: Batch[Targets]) -> LabelMapTargets:
    """The label maps of a batch that a reader of such targets made."""
    assert isinstance(batch.targets, LabelMapTargets), "a task's module is given batches with the task's own targets"
    return batch.targets


def fitted(maps: Tensor, height: int, width: int) -> Tensor:
    """Label maps [B, S, S] of the canvas -> int64 [B, height, width]; what the canvas does not have is ignored."""
    maps = maps[:, :height, :width].long()
    return F.pad(maps, (0, width - maps.shape[2], 0, height - maps.shape[1]), value=IGNORED)


def _pixel_loss(logits: Tensor, maps: Tensor) -> Tensor:
    """Cross-entropy of the pixels with a class, averaged over the joined batch."""
    values = F.cross_entropy(_enlarged(logits, maps.shape[1:]), maps, ignore_index=IGNORED, reduction="none").flatten()
    known = (maps != IGNORED).flatten()
    return global_mean(values, known, summed(known.sum()))


def _accuracy(logits: Tensor, maps: Tensor) -> Tensor:
    right = (_enlarged(logits, maps.shape[1:]).argmax(1) == maps).float().flatten()
    known = (maps != IGNORED).flatten()
    return global_mean(right, known, summed(known.sum()))


def _enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def _initialize(head: torch.nn.Module) -> None:
    """mmsegmentation's first values: He's for convolutions, a deviation of .01 for the classifier."""
    for layer in head.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
    torch.nn.init.normal_(head.classifier.weight, std=0.01)  # type: ignore[arg-type, union-attr]
