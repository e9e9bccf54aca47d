"""The base of dense tasks' modules: pictures of one shape on all ranks, and the image model's features in fp32."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from data_pipeline.reading import Targets
from data_pipeline.reading.batch import Batch, normalize
from pretrain.models import InternImage
from pretrain.objectives.collectives import largest
from pretrain.tasks.dense.fp32 import exact
from pretrain.tasks.module import BackboneLayout, TaskModule, layout_of

STRIDE = 32  # of the last stage: sides are padded to its multiples


class Sized(Protocol):
    """Targets that know the size of each view in its canvas, int64 [B, 2]."""

    @property
    def sizes(self) -> Tensor: ...


class Pictures(NamedTuple):
    """images: [B, 3, H, W], normalised, fp32, zeros beyond a picture's own size. sizes: (height, width) of each."""

    images: Tensor
    sizes: list[tuple[int, int]]


class Instances(NamedTuple):
    """Predictions of one picture, in pixels of the picture that the module was given, best first.

    boxes: [n, 4] left, top, right, bottom. masks: [n, h, w] probabilities within the boxes (Mask R-CNN) or over the
    whole picture (`whole_masks` of the module), None for a detector.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None


class PredictsInstances(Protocol):
    """A module that finds objects."""

    whole_masks: bool

    def instances(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """Normalised images [B, 3, H, W], zeros beyond `sizes` -> the objects of each."""


class PredictsClasses(Protocol):
    """A module that gives every pixel a class."""

    def class_scores(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Normalised images [B, 3, H, W] -> scores [B, classes, H, W] that may be summed over views."""


class DenseModule(TaskModule):
    """An image model under heads that read its four stages. Parts of it that no stage depends on are frozen, and stay
    with it for the hand-off. frozen_stages: 1 freezes the stem and the first stage, and so on.
    """

    def __init__(self, image: InternImage, mean: Sequence[float], std: Sequence[float], frozen_stages: int) -> None:
        super().__init__()
        self.image, self.mean, self.std = image, tuple(mean), tuple(std)
        used = ("stem.", *(f"stages.{stage}." for stage in range(4)))
        frozen = ("stem.", *(f"stages.{stage}." for stage in range(frozen_stages))) if frozen_stages else ()
        for name, parameter in image.named_parameters():
            parameter.requires_grad_(name.startswith(used) and not (frozen and name.startswith(frozen)))

    @property
    def widths(self) -> list[int]:
        """Channels of the four stages."""
        return [self.image.channels * 2**stage for stage in range(4)]

    def backbone(self) -> BackboneLayout:
        return layout_of(self.image, "image.")

    def pictures(self, batch: Batch[Targets], targets: Sized) -> Pictures:
        """A micro-batch's views, cut from their canvases to the largest size on all ranks, up to a multiple of 32: what
        a head says of a picture must not depend on which pictures its rank has beside it.
        """
        height, width = padded(largest(targets.sizes.amax(0)).tolist())
        views = batch.views[:, 0, :height, :width]
        missing = height - views.shape[1], width - views.shape[2]
        if any(missing):
            views = torch.nn.functional.pad(views, (0, 0, 0, missing[1], 0, missing[0]))
        images = normalize(views.contiguous(), self.mean, self.std)
        sizes = [(int(height), int(width)) for height, width in targets.sizes.tolist()]
        return Pictures(clear_beyond(images, targets.sizes), sizes)

    def features(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> the four stages' maps [B, C, H', W'] in fp32, strides 4 to 32."""
        found = self.image.forward_stages(images.to(self.image.stem.conv1.weight.dtype))
        return [exact(stage.permute(0, 3, 1, 2)) for stage in found]


def padded(sides: Sequence[float]) -> list[int]:
    """Each side up to the next multiple of STRIDE."""
    return [-(-int(side) // STRIDE) * STRIDE for side in sides]


def clear_beyond(images: Tensor, sizes: Tensor) -> Tensor:
    """images [B, C, H, W] with zeros beyond each one's size. sizes: int64 [B, 2]."""
    rows = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]
    columns = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]
    return images * (rows[:, None, :, None] & columns[:, None, None, :])
