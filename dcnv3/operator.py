"""`dcnv3`: the operator as a function. Checks, then the best backend that is here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dcnv3.backends import choose
from dcnv3.geometry import Geometry, check_tensors, make_geometry
from dcnv3.reference import dcnv3_reference, packed_reference
from dcnv3.registration import PACKED, PLAIN, autocast


def dcnv3(
    value: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    *,
    groups: int,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    mask_activation: str = "softmax",
    backend: str | None = None,
) -> torch.Tensor:
    """Deformable convolution v3: sample `value` at K shifted points a pixel and group, and sum them by `mask`.

    Args:
        value: [N, H, W, G*C'], channels last; float64, float32, bfloat16 or float16 (computed in float32).
        offset: [N, Ho, Wo, G*K*2] in pixels, a (w, h) pair a point, points w-major (see `dcnv3.geometry`).
        mask: [N, Ho, Wo, G*K] logits; `mask_activation` over the K points of a group is part of the operator.
        groups: G.
        kernel_size, stride, padding, dilation: an integer or a (height, width) pair.
        offset_scale: multiplies the kernel's own grid too, as in InternImage (2.0 starts as a dilated kernel).
        remove_center: drop the centre point: K = kernel_h * kernel_w - 1. Odd square kernels only.
        mask_activation: "softmax", "sigmoid" or "none".
        backend: None or "auto" for the best here, or a name of `available_backends()`.

    Returns:
        [N, Ho, Wo, G*C'].

    Raises:
        ValueError: a wrong shape, dtype, device or option; names the argument and what was expected.

    Source: InternImage (Wang et al., CVPR 2023), equation 2.
    """
    geometry = make_geometry(
        groups=groups,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        offset_scale=offset_scale,
        remove_center=remove_center,
        mask_activation=mask_activation,
    )
    if isinstance(value, torch.Tensor) and isinstance(offset, torch.Tensor) and isinstance(mask, torch.Tensor):
        value, offset, mask = autocast(value.device.type, value, offset, mask)
    check_tensors(value, offset, mask, geometry)
    if choose(backend, value.device.type) == "reference":
        return dcnv3_reference(value, offset, mask, geometry)
    return PLAIN.forward(value, offset, mask, *geometry)


def packed_dcnv3(
    value: torch.Tensor, packed: torch.Tensor, geometry: Geometry, *, center: bool, backend: str | None
) -> torch.Tensor:
    """The operator as the layer calls it: nothing is checked that the layer has made itself.

    Args:
        value: [N, H, W, G*C'].
        packed: [N, Ho, Wo, P], a pixel's offsets, logits and, with `center`, a logit s a group
            (see `dcnv3.reference.unpack`).
        center: mix the value back in: sampled * (1 - sigmoid(s)) + value * sigmoid(s). Ho, Wo are then H, W.

    Returns:
        [N, Ho, Wo, G*C'].
    """
    if choose(backend, value.device.type) == "reference":
        return packed_reference(value, packed, geometry, center)
    return PACKED.forward(value, packed, *geometry, center)
