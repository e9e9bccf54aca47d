"""Where DCNv3 samples: checked sizes, the order of the points, and what a wrong argument is told.

One output pixel (h, w) of one group reads K points. Point k stands for the kernel cell (i, j), *w-major*:

    for i in range(kernel_w):          for j in range(kernel_h):          k = i * kernel_h + j

    location_w = w * stride_w - padding_w + r_w + (i * dilation_w - r_w + offset_w) * offset_scale
    r_w        = (dilation_w * (kernel_w - 1)) >> 1                       (height likewise, with j)

Source: InternImage (Wang et al., CVPR 2023), section 3.1, and the layout of its public operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

ACTIVATIONS = ("softmax", "sigmoid", "none")
BACKENDS = ("cpu", "cuda", "triton", "reference")
LARGEST = 2**31 - 1  # the kernels' integers
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Geometry(NamedTuple):
    """Everything about one call but its tensors, in the order of the `torch.library` schema."""

    groups: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    offset_scale: float
    remove_center: bool
    activation: int  # index into ACTIVATIONS

    @property
    def points(self) -> int:
        """K, the sampling points of one pixel and group."""
        return self.kernel_h * self.kernel_w - int(self.remove_center)

    def places(self, center: bool) -> int:
        """Numbers that a pixel is sampled by: offsets, logits and, with `center`, the centre's logit of each group."""
        return self.groups * (3 * self.points + int(center))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output for an input of `height` by `width`."""
        span_h = self.dilation_h * (self.kernel_h - 1) + 1
        span_w = self.dilation_w * (self.kernel_w - 1) + 1
        return (
            (height + 2 * self.padding_h - span_h) // self.stride_h + 1,
            (width + 2 * self.padding_w - span_w) // self.stride_w + 1,
        )

    def cells(self) -> list[tuple[int, int]]:
        """Kernel cells (i, j) = (column, row) in the order of the points."""
        cells = [(i, j) for i in range(self.kernel_w) for j in range(self.kernel_h)]
        if self.remove_center:
            cells.remove((self.kernel_w // 2, self.kernel_h // 2))
        return cells


def is_integer(value: object, least: int) -> bool:
    """Whether `value` is an integer from `least` that the kernels can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def integer(name: str, value: int, least: int) -> int:
    """`value` itself; ValueError names the argument where it is no integer of at least `least`."""
    if not is_integer(value, least):
        raise ValueError(f"{name}: expected an integer of at least {least} (and below 2**31), got {value!r}")
    return value


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """(height, width) from an integer or a pair; ValueError names the argument."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or not all(is_integer(v, least) for v in both):
        raise ValueError(
            f"{name}: expected an integer of at least {least} (and below 2**31) or a (height, width) pair, "
            f"got {value!r}"
        )
    return both[0], both[1]


def check_backend(backend: str | None) -> None:
    """ValueError where `backend` is none of the names, `auto` and None; whether it is here is for `dcnv3.backends`."""
    if not (backend is None or (isinstance(backend, str) and backend in ("auto", *BACKENDS))):
        raise ValueError(f"backend: expected auto or one of {', '.join(BACKENDS)}, got {backend!r}")


def make_geometry(
    *,
    groups: int,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    mask_activation: str = "softmax",
) -> Geometry:
    """Check the arguments that are not tensors. ValueError names the argument and what was expected."""
    integer("groups", groups, 1)
    kernel = pair("kernel_size", kernel_size, 1)
    spread = pair("dilation", dilation, 1)
    if any(d * (k - 1) > LARGEST for d, k in zip(spread, kernel, strict=True)):
        raise ValueError(f"dilation: expected a kernel below 2**31 pixels, got {dilation!r} with kernel_size {kernel}")
    if not isinstance(mask_activation, str) or mask_activation not in ACTIVATIONS:
        raise ValueError(f"mask_activation: expected one of {', '.join(ACTIVATIONS)}, got {mask_activation!r}")
    if not isinstance(remove_center, bool):
        raise ValueError(f"remove_center: expected True or False, got {remove_center!r}")
    if remove_center and (kernel[0] != kernel[1] or kernel[0] % 2 == 0 or kernel[0] == 1):
        raise ValueError(f"remove_center: needs an odd square kernel of at least 3, got kernel_size {kernel}")
    if not isinstance(offset_scale, (int, float)) or isinstance(offset_scale, bool) or not abs(offset_scale) < 2**127:
        raise ValueError(f"offset_scale: expected a finite number, got {offset_scale!r}")
    return Geometry(
        groups,
        *kernel,
        *pair("stride", stride, 1),
        *pair("padding", padding, 0),
        *spread,
        float(offset_scale),
        remove_center,
        ACTIVATIONS.index(mask_activation),
    )


def check_tensors(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, geometry: Geometry) -> None:
    """Check the tensors against each other and the geometry.

    Raises:
        ValueError: naming the argument, its shape (dtype, device) and what was expected.
    """
    for name, tensor in (("value", value), ("offset", offset), ("mask", mask)):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise ValueError(
                f"{name}: expected a dense (strided) tensor, got a {kind} one of {tensor.dim()} dimensions"
            )
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [N, H, W, channels], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.dtype != value.dtype:
            raise ValueError(f"{name}: expected the dtype of value, {value.dtype}, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"{name}: expected the device of value, {value.device}, got {tensor.device}")
    n, height, width, channels = value.shape
    if channels == 0 or channels % geometry.groups:
        raise ValueError(
            f"value: channels must be a positive multiple of groups={geometry.groups}, got shape {tuple(value.shape)}"
        )
    if height == 0 or width == 0:
        raise ValueError(f"value: expected a map of at least one pixel, got shape {tuple(value.shape)}")
    out_h, out_w = geometry.output_size(height, width)
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"value: a {height} by {width} map is smaller than the kernel {geometry.kernel_h} by {geometry.kernel_w} "
            f"with padding {geometry.padding_h}, {geometry.padding_w}; shape {tuple(value.shape)}"
        )
    for name, tensor, per_point in (("offset", offset, 2), ("mask", mask, 1)):
        expected = (n, out_h, out_w, geometry.groups * geometry.points * per_point)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name}: expected shape {expected} (batch, output rows, output columns, "
                f"groups * points{' * 2' if per_point == 2 else ''}), got {tuple(tensor.shape)}"
            )
