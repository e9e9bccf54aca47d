"""DCNv3 in plain PyTorch: the definition the compiled kernels are tested against, and the backend of last resort.

A gather of the four corners, weighted; every step is a differentiable torch operation, so it gives higher derivatives,
runs on any device and exports to standard ONNX operators. It keeps about 5 K times the output in memory.
"""

from __future__ import annotations

import torch

from dcnv3.geometry import Geometry


def activate(mask: torch.Tensor, activation: int) -> torch.Tensor:
    """The modulation of the points, over the last dimension: softmax (0), sigmoid (1) or as given (2)."""
    if activation == 0:
        return mask.softmax(-1)
    return mask.sigmoid() if activation == 1 else mask


def unpack(
    packed: torch.Tensor, geometry: Geometry, center: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Views of packed [..., P]: offset [..., G*K*2], mask [..., G*K], and with `center` the centre's logits [..., G].

    P may be larger than they need: the rest is padding, which nothing reads.
    """
    places = geometry.groups * geometry.points
    share = packed[..., 3 * places : geometry.places(center)] if center else None
    return packed[..., : 2 * places], packed[..., 2 * places : 3 * places], share


def mix(sampled: torch.Tensor, center: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """sampled, center: [..., G*C'], share: [..., G] -> sampled * (1 - s) + center * s, s = sigmoid(share)."""
    groups = (share.shape[-1], -1)
    mixed = torch.lerp(sampled.unflatten(-1, groups), center.unflatten(-1, groups), share.sigmoid().unsqueeze(-1))
    return mixed.flatten(-2)


def packed_reference(value: torch.Tensor, packed: torch.Tensor, geometry: Geometry, center: bool) -> torch.Tensor:
    """`dcnv3_reference` of the parts of packed [N, Ho, Wo, P] (see `unpack`), with `center` mixed with the value."""
    offset, mask, share = unpack(packed, geometry, center)
    sampled = dcnv3_reference(value, offset, mask, geometry)
    return sampled if share is None else mix(sampled, value, share)


def dcnv3_reference(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """[N, H, W, G*C'] sampled at offset [N, Ho, Wo, G*K*2], weighted by mask [N, Ho, Wo, G*K] -> [N, Ho, Wo, G*C'].

    float16 and bfloat16 are computed in float32. The derivative with respect to a location exactly on an integer is
    that of the cell it is the floor of.
    """
    n, height, width, channels = value.shape
    out_h, out_w = geometry.output_size(height, width)
    groups, points = geometry.groups, geometry.points
    dtype = value.dtype
    compute = dtype if dtype == torch.float64 else torch.float32
    value, offset, mask = value.to(compute), offset.to(compute), mask.to(compute)

    rows = value.reshape(n * height * width * groups, channels // groups)
    shift = offset.reshape(n, out_h, out_w, groups, points, 2)
    weight = activate(mask.reshape(n, out_h, out_w, groups, points), geometry.activation)

    def arange(size: int) -> torch.Tensor:
        return torch.arange(size, device=value.device)

    radius_h = (geometry.dilation_h * (geometry.kernel_h - 1)) >> 1
    radius_w = (geometry.dilation_w * (geometry.kernel_w - 1)) >> 1
    cells = torch.tensor(geometry.cells(), device=value.device, dtype=compute)
    cell_w = cells[:, 0] * geometry.dilation_w - radius_w
    cell_h = cells[:, 1] * geometry.dilation_h - radius_h
    start_w = (arange(out_w) * geometry.stride_w - geometry.padding_w + radius_w).to(compute)[:, None, None]
    start_h = (arange(out_h) * geometry.stride_h - geometry.padding_h + radius_h).to(compute)[:, None, None, None]
    loc_w = start_w + (cell_w + shift[..., 0]) * geometry.offset_scale  # [N, Ho, Wo, G, K]
    loc_h = start_h + (cell_h + shift[..., 1]) * geometry.offset_scale

    # Written so that a NaN location is outside, and replaced before the arithmetic so that it gives no NaN gradient.
    inside = (loc_h > -1) & (loc_w > -1) & (loc_h < height) & (loc_w < width)
    loc_h = torch.where(inside, loc_h, torch.zeros_like(loc_h))
    loc_w = torch.where(inside, loc_w, torch.zeros_like(loc_w))
    weight = torch.where(inside, weight, torch.zeros_like(weight))
    floor_h, floor_w = loc_h.detach().floor(), loc_w.detach().floor()
    high_h, high_w = loc_h - floor_h, loc_w - floor_w
    floor_h, floor_w = floor_h.long(), floor_w.long()

    image = arange(n)[:, None, None, None, None] * height
    group = arange(groups)[:, None]
    output = torch.zeros(n, out_h, out_w, groups, channels // groups, device=value.device, dtype=compute)
    for step_h in (0, 1):
        for step_w in (0, 1):
            y, x = floor_h + step_h, floor_w + step_w
            valid = (y >= 0) & (x >= 0) & (y < height) & (x < width)
            share = (high_h if step_h else 1 - high_h) * (high_w if step_w else 1 - high_w) * valid
            index = ((image + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)) * groups + group
            corner = rows.index_select(0, index.reshape(-1)).reshape(*index.shape, channels // groups)
            output = output + ((weight * share).unsqueeze(-1) * corner).sum(-2)
    return output.reshape(n, out_h, out_w, channels).to(dtype)
