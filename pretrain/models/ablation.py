"""The paper's ablations of the operator, and what sharing the points' weights saves. No torch.

The variants are arguments of InternImage: `share_weights=False` (each of the K points has its own projection, so that
output_proj reads K*C features), `groups=(1, 1, 1, 1)`, `mask_activation="sigmoid"`.

The paper states that sharing saves H 42.0 % of its parameters and, per image at 224 px and batch 32, 84.2 % of GPU
memory; what the unshared model is made of it does not say. Here the first is counted for the unshared output projection
above. The second is derived: for one operator here, for the whole model in pretrain.analysis.variants.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.models.counting import parameters
from pretrain.models.variants import VARIANTS

PUBLISHED = {  # IN-1K top-1 of T, COCO box AP with Mask R-CNN 1x
    "as published": (83.5, 47.2),
    "one group": (82.3, 43.8),
    "sigmoid": (65.7, 38.7),
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "one group": {"groups": (1, 1, 1, 1)},
    "sigmoid": {"mask_activation": "sigmoid"},
    "unshared weights": {"share_weights": False},
}


@dataclass(frozen=True)
class Saving:
    """What sharing saves, as shares of the unshared model's: 0.41 is 41 %.

    parameters: of the whole classifier. backbone: without its head.
    operator: peak memory of one deformable convolution's training, between its projections (see `operator_memory`).
    """

    parameters: float
    backbone: float
    operator: float


def sharing_saves(arguments: Mapping[str, Any] | None = None) -> Saving:
    """For InternImage(**arguments); H by default."""
    arguments = dict(VARIANTS["internimage_h"].arguments if arguments is None else arguments)
    shared, unshared = parameters(arguments), parameters({**arguments, "share_weights": False})
    points = arguments.get("kernel_size", 3) ** 2 - arguments.get("remove_center", False)
    width = arguments["channels"] // arguments["groups"][0]
    return Saving(
        parameters=1 - shared.total / unshared.total,
        backbone=1 - (shared.total - shared.head) / (unshared.total - unshared.head),
        operator=1 - operator_memory(points, width, True) / operator_memory(points, width, False),
    )


def operator_memory(points: int, group_width: int, share_weights: bool) -> float:
    """Peak of what one deformable convolution holds in training between its projections, in units of its input [N,
    H, W, C].

    Derived, for an operator that stores nothing but its inputs and output: the peak is in the backward pass of the
    output projection, when the projected input (1), the offsets and masks (3K/C'), the sampled features, their
    gradient, and the gradient that comes in (1) are there. The sampled features are C wide with shared weights, K*C
    without.
    """
    sampled = 1 if share_weights else points
    return 1 + 3 * points / group_width + 2 * sampled + 1
