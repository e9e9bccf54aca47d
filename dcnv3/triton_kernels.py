"""The operator in Triton: for GPUs where the CUDA kernels were not built. It needs no compiler at installation.

A program takes a block of pixels of one group and all of the group's channels. Offsets, logits and the centre's logits
are tensors of their own or parts of one: a pixel's row is so many elements from the next. The arithmetic is that of
`csrc/sampling.h`. Triton's interpreter (TRITON_INTERPRET=1, set before this is imported) runs it on a CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dcnv3 import registration
from dcnv3.geometry import Geometry, check_tensors
from dcnv3.reference import unpack


@triton.jit
def _axis(start, cell, offset, size, SCALE: tl.constexpr):
    """The two pixels around a location: numbers inside the image, weights, and whether each counts."""
    loc = (cell + offset) * SCALE + start
    near = tl.where(loc > -1, loc, -1)  # a NaN location is outside
    near = tl.where(near < size, near, size)
    low = tl.floor(near)
    counts0 = ((loc >= 0) & (loc < size)).to(loc.dtype)
    counts1 = ((loc > -1) & (loc < size - 1)).to(loc.dtype)
    index = low.to(tl.int32)
    first = tl.minimum(tl.maximum(index, 0), size - 1)
    second = tl.minimum(tl.maximum(index + 1, 0), size - 1)
    return first, second, counts0 * (1 - (near - low)), counts1 * (near - low), counts0, counts1


@triton.jit
def _pixels(pixels, out_h, out_w, BLOCK: tl.constexpr):
    """The program's output pixels: numbers, whether they are there, image, row, column."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = pixel < pixels
    pixel = tl.minimum(pixel, pixels - 1)
    return pixel, live, pixel // (out_w * out_h), pixel // out_w % out_h, pixel % out_w


@triton.jit
def _softmax(mask, K: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr):
    """The logits, the largest of them and one over the sum of the exponentials. `mask`: where a group's logits are."""
    k = tl.arange(0, BLOCK_K)[None, :]
    logits = tl.load(mask[:, None] + k, mask=k < K, other=-float("inf")).to(COMPUTE)
    top = tl.max(logits, 1)
    return logits, top, 1 / tl.sum(tl.exp(logits - top[:, None]), 1)


@triton.jit
def _point(
    offset, mask, k, row, column, top, share, height, width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    SCALE: tl.constexpr, MIDDLE: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Point k's weight and its two axes. Points are w-major; from MIDDLE on, one cell is left out."""
    cell = tl.where(k >= MIDDLE, k + 1, k)
    radius_h: tl.constexpr = (DILATION_H * (KERNEL_H - 1)) >> 1
    radius_w: tl.constexpr = (DILATION_W * (KERNEL_W - 1)) >> 1
    weight = tl.load(mask + k).to(COMPUTE)
    if ACTIVATION == 0:
        weight = tl.exp(weight - top) * share
    if ACTIVATION == 1:
        weight = 1 / (1 + tl.exp(-weight))
    shift_w = tl.load(offset + 2 * k).to(COMPUTE)
    shift_h = tl.load(offset + 2 * k + 1).to(COMPUTE)
    start_w = (column * STRIDE_W - PADDING_W + radius_w).to(COMPUTE)
    start_h = (row * STRIDE_H - PADDING_H + radius_h).to(COMPUTE)
    cell_w = (cell // KERNEL_H * DILATION_W - radius_w).to(COMPUTE)
    cell_h = (cell % KERNEL_H * DILATION_H - radius_h).to(COMPUTE)
    y0, y1, h0, h1, top_counts, bottom_counts = _axis(start_h, cell_h, shift_h, height, SCALE)
    x0, x1, w0, w1, left_counts, right_counts = _axis(start_w, cell_w, shift_w, width, SCALE)
    return weight, y0, y1, h0, h1, top_counts, bottom_counts, x0, x1, w0, w1, left_counts, right_counts


@triton.jit
def _forward(
    value, offset, mask, center, output, pixels, height, width, out_h, out_w, groups, channels, offset_row, mask_row,
    K: tl.constexpr, GEOMETRY: tl.constexpr, MIDDLE: tl.constexpr, ACTIVATION: tl.constexpr, CENTER: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixel, live, image, row, column = _pixels(pixels, out_h, out_w, BLOCK)
    group = tl.program_id(1)
    rows = (pixel * groups + group) * channels
    offset += pixel * offset_row + group * (2 * K)
    mask += pixel * mask_row + group * K
    c = tl.arange(0, BLOCK_C)[None, :]
    within = live[:, None] & (c < channels)
    _logits, top, share = _softmax(mask, K, BLOCK_K, COMPUTE)
    total = tl.zeros([BLOCK, BLOCK_C], COMPUTE)
    for k in range(K):
        p, y0, y1, h0, h1, _a, _b, x0, x1, w0, w1, _c, _d = _point(
            offset, mask, k, row, column, top, share, height, width,
            GEOMETRY[0], GEOMETRY[1], GEOMETRY[2], GEOMETRY[3], GEOMETRY[4], GEOMETRY[5], GEOMETRY[6], GEOMETRY[7],
            GEOMETRY[8], MIDDLE, ACTIVATION, COMPUTE,
        )  # fmt: skip
        for corner in tl.static_range(4):
            y, x = (y1 if corner // 2 else y0), (x1 if corner % 2 else x0)
            part = p * (h1 if corner // 2 else h0) * (w1 if corner % 2 else w0)
            at = (((image * height + y) * width + x) * groups + group) * channels
            total += part[:, None] * tl.load(value + at[:, None] + c, mask=within, other=0).to(COMPUTE)
    if CENTER:  # the output is as large as the value, so that its pixels have the same rows
        s = 1 / (1 + tl.exp(-tl.load(center + pixel * mask_row + group).to(COMPUTE)))
        total += s[:, None] * (tl.load(value + rows[:, None] + c, mask=within, other=0).to(COMPUTE) - total)
    tl.store(output + rows[:, None] + c, total.to(output.dtype.element_ty), mask=within)


@triton.jit
def _backward(
    grad_output, value, offset, mask, center, grad_value, grad_offset, grad_mask, grad_center,
    pixels, height, width, out_h, out_w, groups, channels, offset_row, mask_row,
    K: tl.constexpr, GEOMETRY: tl.constexpr, MIDDLE: tl.constexpr, ACTIVATION: tl.constexpr, CENTER: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixel, live, image, row, column = _pixels(pixels, out_h, out_w, BLOCK)
    group = tl.program_id(1)
    rows = (pixel * groups + group) * channels
    offset += pixel * offset_row + group * (2 * K)
    mask += pixel * mask_row + group * K
    grad_offset += pixel * offset_row + group * (2 * K)
    grad_mask += pixel * mask_row + group * K
    c = tl.arange(0, BLOCK_C)[None, :]
    within = live[:, None] & (c < channels)
    logits, top, share = _softmax(mask, K, BLOCK_K, COMPUTE)
    gradient = tl.load(grad_output + rows[:, None] + c, mask=within, other=0).to(COMPUTE)
    if CENTER:
        s = 1 / (1 + tl.exp(-tl.load(center + pixel * mask_row + group).to(COMPUTE)))
        tl.atomic_add(grad_value + rows[:, None] + c, s[:, None] * gradient, mask=within, sem="relaxed")
        gradient *= 1 - s[:, None]
        apart = tl.sum(gradient * tl.load(value + rows[:, None] + c, mask=within, other=0).to(COMPUTE), 1)
    points = tl.arange(0, BLOCK_K)[None, :]
    to_weights = tl.zeros([BLOCK, BLOCK_K], COMPUTE)
    for k in range(K):
        p, y0, y1, h0, h1, hs0, hs1, x0, x1, w0, w1, ws0, ws1 = _point(
            offset, mask, k, row, column, top, share, height, width,
            GEOMETRY[0], GEOMETRY[1], GEOMETRY[2], GEOMETRY[3], GEOMETRY[4], GEOMETRY[5], GEOMETRY[6], GEOMETRY[7],
            GEOMETRY[8], MIDDLE, ACTIVATION, COMPUTE,
        )  # fmt: skip
        to_weight = tl.zeros([BLOCK], COMPUTE)
        to_h = tl.zeros([BLOCK], COMPUTE)
        to_w = tl.zeros([BLOCK], COMPUTE)
        for corner in tl.static_range(4):
            y, x = (y1 if corner // 2 else y0), (x1 if corner % 2 else x0)
            h, w = (h1 if corner // 2 else h0), (w1 if corner % 2 else w0)
            slope_h = hs1 if corner // 2 else -hs0
            slope_w = ws1 if corner % 2 else -ws0
            at = ((((image * height + y) * width + x) * groups + group) * channels)[:, None] + c
            part = (p * h * w)[:, None]
            tl.atomic_add(grad_value + at, part * gradient, mask=within & (part != 0), sem="relaxed")
            dot = tl.sum(gradient * tl.load(value + at, mask=within, other=0).to(COMPUTE), 1)
            to_weight += h * w * dot
            to_h += slope_h * w * dot
            to_w += slope_w * h * dot
        to_weights = tl.where(points == k, to_weight[:, None], to_weights)
        tl.store(grad_offset + 2 * k, (p * to_w * GEOMETRY[8]).to(grad_offset.dtype.element_ty), mask=live)
        tl.store(grad_offset + 2 * k + 1, (p * to_h * GEOMETRY[8]).to(grad_offset.dtype.element_ty), mask=live)
    weights = tl.where(points < K, logits, 0)
    if ACTIVATION == 0:
        weights = tl.exp(logits - top[:, None]) * share[:, None]
    if ACTIVATION == 1:
        weights = 1 / (1 + tl.exp(-logits))
    mean = tl.sum(weights * to_weights, 1)
    if ACTIVATION == 0:
        to_weights = weights * (to_weights - mean[:, None])
    if ACTIVATION == 1:
        to_weights = weights * (1 - weights) * to_weights
    to_logits = to_weights.to(grad_mask.dtype.element_ty)
    tl.store(grad_mask[:, None] + points, to_logits, mask=live[:, None] & (points < K))
    if CENTER:
        to_center = (s * (apart - mean)).to(grad_mask.dtype.element_ty)
        tl.store(grad_center + pixel * mask_row + group, to_center, mask=live)


class _Places(NamedTuple):
    """What a call is sampled by, or its gradients: tensors of their own, or parts of one."""

    offset: torch.Tensor
    mask: torch.Tensor
    center: torch.Tensor | None


def _launch(kernel: Any, before: list[torch.Tensor], places: _Places, after: list[torch.Tensor], g: Geometry) -> None:
    """Run `kernel` on the tensors in this order; `before` ends with the value, the centre may be missing."""
    value = before[-1]
    n, height, width, channels = value.shape
    out_h, out_w = g.output_size(height, width)
    pixels, group_channels = n * out_h * out_w, channels // g.groups
    if pixels == 0:
        return
    block_c = triton.next_power_of_2(group_channels)
    block = max(1, min(64, 1024 // block_c))
    middle = g.kernel_h // 2 * (g.kernel_h + 1) if g.remove_center else g.kernel_h * g.kernel_w
    center = places.mask if places.center is None else places.center  # not read where there is none
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(pixels, block), g.groups)](
            *before, places.offset, places.mask, center, *after, pixels, height, width, out_h, out_w, g.groups,
            group_channels, places.offset.stride(2), places.mask.stride(2),
            K=g.points, GEOMETRY=tuple(g[1:10]), MIDDLE=middle, ACTIVATION=g.activation,
            CENTER=places.center is not None, COMPUTE=tl.float64 if value.dtype == torch.float64 else tl.float32,
            BLOCK=block, BLOCK_K=triton.next_power_of_2(g.points), BLOCK_C=block_c,
        )  # fmt: skip


def _checked(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *geometry: Any) -> Geometry:
    """The geometry, once tensors and numbers fit together: the raw operator is called with whatever there is.

    Raises:
        ValueError: what does not fit.
    """
    g = Geometry(*geometry)
    square = g.kernel_h == g.kernel_w and g.kernel_h % 2 == 1
    if min(*g[:5], *g[7:9]) < 1 or min(g[5:7]) < 0 or g.activation not in (0, 1, 2) or (g.remove_center and not square):
        raise ValueError(f"dcnv3: no such geometry: {g}")
    check_tensors(value, offset, mask, g)
    return g


def _run_forward(value: torch.Tensor, places: _Places, g: Geometry) -> torch.Tensor:
    output = value.new_empty((value.shape[0], *g.output_size(value.shape[1], value.shape[2]), value.shape[3]))
    _launch(_forward, [value], places, [output], g)
    return output


def _run_backward(
    grad_output: torch.Tensor, value: torch.Tensor, places: _Places, grads: _Places, g: Geometry
) -> torch.Tensor:
    """The value's gradient; those of the places are written to `grads`, which lie as `places` do."""
    if grad_output.shape != (value.shape[0], *g.output_size(*value.shape[1:3]), value.shape[3]):
        raise ValueError(f"grad_output: expected the output's shape, got {tuple(grad_output.shape)}")
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    grad_value = torch.zeros_like(value, dtype=compute)
    to_center = grads.mask if grads.center is None else grads.center
    after = [grad_value, grads.offset, grads.mask, to_center]
    _launch(_backward, [grad_output.contiguous(), value], places, after, g)
    return grad_value.to(value.dtype)


def forward(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *geometry: Any) -> torch.Tensor:
    """`dcnv3::forward`: see `dcnv3.registration`."""
    g = _checked(value, offset, mask, *geometry)
    return _run_forward(value.contiguous(), _Places(offset.contiguous(), mask.contiguous(), None), g)


def backward(
    grad_output: torch.Tensor, value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dcnv3::backward`, whose sums are in no order of their own: the deterministic mode is the definition's."""
    *geometry, deterministic = rest
    g = _checked(value, offset, mask, *geometry)
    if deterministic:
        return registration.fallback_backward(grad_output, value, offset, mask, *rest)
    places = _Places(offset.contiguous(), mask.contiguous(), None)
    grads = _Places(torch.empty_like(places.offset), torch.empty_like(places.mask), None)
    return _run_backward(grad_output, value.contiguous(), places, grads, g), grads.offset, grads.mask


def _unpacked(value: torch.Tensor, packed: torch.Tensor, *rest: Any) -> tuple[Geometry, _Places]:
    """The geometry and the parts of `packed`, checked.

    Raises:
        ValueError: what does not fit.
    """
    *geometry, center = rest
    g = Geometry(*geometry)
    if packed.dim() != 4 or packed.shape[-1] < g.places(center):
        raise ValueError(
            f"packed has shape {tuple(packed.shape)}, expected at least {g.places(center)} numbers a pixel"
        )
    places = _Places(*unpack(packed, g, center))
    _checked(value, places.offset, places.mask, *geometry)
    if center and (g.stride_h, g.stride_w, *packed.shape[1:3]) != (1, 1, *value.shape[1:3]):
        raise ValueError("the centre needs an output of the value's size")
    return g, places


def packed_forward(value: torch.Tensor, packed: torch.Tensor, *rest: Any) -> torch.Tensor:
    """`dcnv3::packed_forward`: see `dcnv3.registration`."""
    g, places = _unpacked(value, packed.contiguous(), *rest)
    return _run_forward(value.contiguous(), places, g)


def packed_backward(
    grad_output: torch.Tensor, value: torch.Tensor, packed: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dcnv3::packed_backward`; the deterministic mode as in `backward`."""
    *call, deterministic = rest
    packed = packed.contiguous()
    g, places = _unpacked(value, packed, *call)
    if deterministic:
        return registration.packed_backward(grad_output, value, packed, *rest)
    grad_packed = torch.empty_like(packed)
    grad_packed[..., g.places(call[-1]) :].zero_()
    grads = _Places(*unpack(grad_packed, g, call[-1]))
    return _run_backward(grad_output, value.contiguous(), places, grads, g), grad_packed
