"""The operator in Triton: for GPUs where the CUDA kernels were not built. It needs no compiler at installation.

A program takes a block of pixels of one group and all of the group's channels. The arithmetic is that of
`csrc/sampling.h`. Triton's interpreter (TRITON_INTERPRET=1, set before this is imported) runs it on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dcnv3.geometry import Geometry, check_tensors
from dcnv3.reference import activate
from dcnv3.registration import fallback_backward


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
def _softmax(mask, base, K: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr):
    """The largest logit and one over the sum of the exponentials."""
    k = tl.arange(0, BLOCK_K)[None, :]
    logits = tl.load(mask + base[:, None] + k, mask=k < K, other=-float("inf")).to(COMPUTE)
    top = tl.max(logits, 1)
    return top, 1 / tl.sum(tl.exp(logits - top[:, None]), 1)


@triton.jit
def _point(
    offset, mask, base, k, row, column, top, share, height, width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    SCALE: tl.constexpr, MIDDLE: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Point k's weight and its two axes. Points are w-major; from MIDDLE on, one cell is left out."""
    cell = tl.where(k >= MIDDLE, k + 1, k)
    radius_h: tl.constexpr = (DILATION_H * (KERNEL_H - 1)) >> 1
    radius_w: tl.constexpr = (DILATION_W * (KERNEL_W - 1)) >> 1
    weight = tl.load(mask + base + k).to(COMPUTE)
    if ACTIVATION == 0:
        weight = tl.exp(weight - top) * share
    if ACTIVATION == 1:
        weight = 1 / (1 + tl.exp(-weight))
    shift_w = tl.load(offset + (base + k) * 2).to(COMPUTE)
    shift_h = tl.load(offset + (base + k) * 2 + 1).to(COMPUTE)
    start_w = (column * STRIDE_W - PADDING_W + radius_w).to(COMPUTE)
    start_h = (row * STRIDE_H - PADDING_H + radius_h).to(COMPUTE)
    cell_w = (cell // KERNEL_H * DILATION_W - radius_w).to(COMPUTE)
    cell_h = (cell % KERNEL_H * DILATION_H - radius_h).to(COMPUTE)
    y0, y1, h0, h1, top_counts, bottom_counts = _axis(start_h, cell_h, shift_h, height, SCALE)
    x0, x1, w0, w1, left_counts, right_counts = _axis(start_w, cell_w, shift_w, width, SCALE)
    return weight, y0, y1, h0, h1, top_counts, bottom_counts, x0, x1, w0, w1, left_counts, right_counts


@triton.jit
def _forward(
    value, offset, mask, output, pixels, height, width, out_h, out_w, groups, channels,
    K: tl.constexpr, GEOMETRY: tl.constexpr, MIDDLE: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixel, live, image, row, column = _pixels(pixels, out_h, out_w, BLOCK)
    unit = pixel * groups + tl.program_id(1)  # (pixel, group)
    base = unit * K
    c = tl.arange(0, BLOCK_C)[None, :]
    within = live[:, None] & (c < channels)
    top, share = _softmax(mask, base, K, BLOCK_K, COMPUTE)
    total = tl.zeros([BLOCK, BLOCK_C], COMPUTE)
    for k in range(K):
        p, y0, y1, h0, h1, _a, _b, x0, x1, w0, w1, _c, _d = _point(
            offset, mask, base, k, row, column, top, share, height, width,
            GEOMETRY[0], GEOMETRY[1], GEOMETRY[2], GEOMETRY[3], GEOMETRY[4], GEOMETRY[5], GEOMETRY[6], GEOMETRY[7],
            GEOMETRY[8], MIDDLE, ACTIVATION, COMPUTE,
        )  # fmt: skip
        for corner in tl.static_range(4):
            y, x = (y1 if corner // 2 else y0), (x1 if corner % 2 else x0)
            part = p * (h1 if corner // 2 else h0) * (w1 if corner % 2 else w0)
            at = (((image * height + y) * width + x) * groups + tl.program_id(1)) * channels
            total += part[:, None] * tl.load(value + at[:, None] + c, mask=within, other=0).to(COMPUTE)
    tl.store(output + (unit * channels)[:, None] + c, total.to(output.dtype.element_ty), mask=within)


@triton.jit
def _backward(
    grad_output, value, offset, mask, grad_value, grad_offset, grad_weight,
    pixels, height, width, out_h, out_w, groups, channels,
    K: tl.constexpr, GEOMETRY: tl.constexpr, MIDDLE: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixel, live, image, row, column = _pixels(pixels, out_h, out_w, BLOCK)
    unit = pixel * groups + tl.program_id(1)
    base = unit * K
    c = tl.arange(0, BLOCK_C)[None, :]
    within = live[:, None] & (c < channels)
    top, share = _softmax(mask, base, K, BLOCK_K, COMPUTE)
    gradient = tl.load(grad_output + (unit * channels)[:, None] + c, mask=within, other=0).to(COMPUTE)
    for k in range(K):
        p, y0, y1, h0, h1, hs0, hs1, x0, x1, w0, w1, ws0, ws1 = _point(
            offset, mask, base, k, row, column, top, share, height, width,
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
            at = ((((image * height + y) * width + x) * groups + tl.program_id(1)) * channels)[:, None] + c
            part = (p * h * w)[:, None]
            tl.atomic_add(grad_value + at, part * gradient, mask=within & (part != 0), sem="relaxed")
            dot = tl.sum(gradient * tl.load(value + at, mask=within, other=0).to(COMPUTE), 1)
            to_weight += h * w * dot
            to_h += slope_h * w * dot
            to_w += slope_w * h * dot
        tl.store(grad_weight + base + k, to_weight, mask=live)
        pair = grad_offset + (base + k) * 2
        tl.store(pair, (p * to_w * GEOMETRY[8]).to(grad_offset.dtype.element_ty), mask=live)
        tl.store(pair + 1, (p * to_h * GEOMETRY[8]).to(grad_offset.dtype.element_ty), mask=live)


def _launch(kernel: Any, tensors: list[torch.Tensor], value: torch.Tensor, out: torch.Size, g: Geometry) -> None:
    n, height, width, channels = value.shape
    pixels, group_channels = n * out[1] * out[2], channels // g.groups
    if pixels == 0:
        return
    block_c = triton.next_power_of_2(group_channels)
    block = max(1, min(64, 1024 // block_c))
    middle = g.kernel_h // 2 * (g.kernel_h + 1) if g.remove_center else g.kernel_h * g.kernel_w
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(pixels, block), g.groups)](
            *tensors, pixels, height, width, out[1], out[2], g.groups, group_channels,
            K=g.points, GEOMETRY=tuple(g[1:10]), MIDDLE=middle, ACTIVATION=g.activation,
            COMPUTE=tl.float64 if value.dtype == torch.float64 else tl.float32,
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


def forward(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *geometry: Any) -> torch.Tensor:
    """`dcnv3::forward`: see `dcnv3.registration`."""
    g = _checked(value, offset, mask, *geometry)
    value, offset, mask = value.contiguous(), offset.contiguous(), mask.contiguous()
    output = value.new_empty((value.shape[0], *g.output_size(value.shape[1], value.shape[2]), value.shape[3]))
    _launch(_forward, [value, offset, mask, output], value, output.shape, g)
    return output


def backward(
    grad_output: torch.Tensor, value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dcnv3::backward`, whose sums are in no order of their own: the deterministic mode is the definition's."""
    *geometry, deterministic = rest
    g = _checked(value, offset, mask, *geometry)
    if grad_output.shape != (value.shape[0], *g.output_size(*value.shape[1:3]), value.shape[3]):
        raise ValueError(f"grad_output: expected the output's shape, got {tuple(grad_output.shape)}")
    if deterministic:
        return fallback_backward(grad_output, value, offset, mask, *rest)
    grad_output, value = grad_output.contiguous(), value.contiguous()
    offset, mask = offset.contiguous(), mask.contiguous()
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    grad_value, grad_offset = torch.zeros_like(value, dtype=compute), torch.empty_like(offset)
    grad_weight = torch.empty_like(mask, dtype=compute)
    tensors = [grad_output, value, offset, mask, grad_value, grad_offset, grad_weight]
    _launch(_backward, tensors, value, grad_output.shape, g)
    # the activation's own gradient is small work: a number a point
    by_point = grad_weight.unflatten(-1, (g.groups, g.points))
    weight = activate(mask.to(compute).unflatten(-1, (g.groups, g.points)), g.activation)
    if g.activation == 0:
        by_point = weight * (by_point - (weight * by_point).sum(-1, keepdim=True))
    elif g.activation == 1:
        by_point = by_point * weight * (1 - weight)
    return grad_value.to(value.dtype), grad_offset, by_point.flatten(-2).to(mask.dtype)
