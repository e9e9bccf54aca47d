"""The image model as the backbone of a transformers model that has it by reference only.

The task's module keeps its InternImage under the name `image`, where layer-wise decay, checkpoints and hand-off look
for it. As a part of the transformers model as well, every parameter would have two names.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BackboneOutput

from pretrain.models import InternImage
from pretrain.tasks.dense.costs import HeadCosts, head_costs, stage_maps
from pretrain.tasks.dense.fp32 import exact


class BorrowedBackbone(nn.Module):
    """pixel_values [B, 3, H, W] -> the stages' maps [B, C, H', W'] in fp32. stages: their numbers, 0 to 3."""

    def __init__(self, image: InternImage, stages: Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self._image, self._stages = (image,), tuple(stages)  # in a tuple, no module of this one
        self.channels = [image.channels * 2**stage for stage in self._stages]
        self._given: tuple[Tensor, ...] | None = None

    @contextmanager
    def giving(self, maps: Sequence[Tensor]) -> Iterator[None]:
        """Within it, the output is made of these maps of the four stages, whatever the pictures are."""
        self._given = tuple(maps[stage] for stage in self._stages)
        try:
            yield
        finally:
            self._given = None

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        if self._given is not None:
            return BackboneOutput(feature_maps=self._given)  # type: ignore[arg-type]
        (image,) = self._image
        found = image.forward_stages(pixel_values.to(image.stem.conv1.weight.dtype))
        maps = tuple(exact(found[stage].permute(0, 3, 1, 2)) for stage in self._stages)
        return BackboneOutput(feature_maps=maps)  # type: ignore[arg-type]


def placeholder_backbone(image: InternImage, stages: Sequence[int] = (0, 1, 2, 3)) -> PretrainedConfig:
    """A backbone configuration of the image model's widths whose model is soon replaced by BorrowedBackbone."""
    from pretrain.models.auto_backbone import InternImageBackboneConfig

    narrow = {"channels": image.channels, "depths": [1, 1, 1, 1], "groups": [1, 1, 1, 1], "num_classes": 0}
    return InternImageBackboneConfig(arguments=narrow, out_indices=stages)


def costs_beside_image(
    net: nn.Module, backbone: BorrowedBackbone, widths: Sequence[int], side: int, call: Callable[[Tensor], object]
) -> HeadCosts:
    """Of `call(pictures)`, which runs the transformers model `net` on the meta device, without its image model.

    In evaluation mode, whose layers are those of training without dropout: in training mode transformers looks for
    infinities, and the meta device has no values to look at.
    """
    maps, training = stage_maps(widths, side), net.training
    net.eval()
    try:
        with backbone.giving(maps):
            return head_costs(lambda: call(torch.empty(1, 3, side, side, device="meta")), (net,), maps)
    finally:
        net.train(training)
