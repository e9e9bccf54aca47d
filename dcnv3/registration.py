"""`torch.ops.dcnv3`: schema, fake kernels, autograd, autocast, and PyTorch's own arithmetic where no kernel is built.

    dcnv3::forward(value, offset, mask, <geometry>) -> output
    dcnv3::backward(grad_output, value, offset, mask, <geometry>, deterministic) -> (grad_value, grad_offset, grad_mask)

The compiled extensions (or Triton) register the CPU and CUDA kernels over these; the fallback below serves every other
device, so that an exported program loads anywhere. The activated mask is never stored: backward computes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dcnv3.geometry import Geometry
from dcnv3.reference import dcnv3_reference

_GEOMETRY = (
    "int groups, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w, "
    "int dilation_h, int dilation_w, float offset_scale, bool remove_center, int activation"
)
_LIBRARY = torch.library.Library("dcnv3", "DEF")
_LIBRARY.define(f"forward(Tensor value, Tensor offset, Tensor mask, {_GEOMETRY}) -> Tensor")
_LIBRARY.define(
    f"backward(Tensor grad_output, Tensor value, Tensor offset, Tensor mask, {_GEOMETRY}, bool deterministic) "
    "-> (Tensor, Tensor, Tensor)"
)

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _forward(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *geometry: Any) -> torch.Tensor:
    return dcnv3_reference(value, offset, mask, Geometry(*geometry))


def fallback_backward(
    grad_output: torch.Tensor, value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *rest: Any
) -> Gradients:
    *geometry, _deterministic = rest
    value, offset, mask = (tensor.detach().requires_grad_() for tensor in (value, offset, mask))
    with torch.enable_grad():
        output = dcnv3_reference(value, offset, mask, Geometry(*geometry))
    grads = torch.autograd.grad(output, (value, offset, mask), grad_output)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


def register(key: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """Kernels in Python for a dispatch key, over the fallback; the extensions register theirs when they are loaded."""
    _LIBRARY.impl("forward", forward, key)
    _LIBRARY.impl("backward", backward, key)


register("CompositeExplicitAutograd", _forward, fallback_backward)


@torch.library.register_fake("dcnv3::forward", lib=_LIBRARY)
def _(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *geometry: Any) -> torch.Tensor:
    n, height, width, channels = value.shape
    return value.new_empty((n, *Geometry(*geometry).output_size(height, width), channels))


@torch.library.register_fake("dcnv3::backward", lib=_LIBRARY)
def _(
    grad_output: torch.Tensor, value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *rest: Any
) -> Gradients:
    return value.new_empty(value.shape), offset.new_empty(offset.shape), mask.new_empty(mask.shape)


class _Backward(torch.autograd.Function):
    """`dcnv3::backward` where it has to have derivatives: the kernel's numbers, differentiated as the definition is."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Gradients:
        ctx.save_for_backward(*arguments[:4])
        ctx.geometry = arguments[4:-1]
        return _run_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        higher = torch.is_grad_enabled()  # third derivatives are wanted too
        with torch.enable_grad():
            # a view is a place of its own in the graph: what value, offset and mask have in common is left to autograd
            tensors = [t.view_as(t) if higher and t.requires_grad else t.detach() for t in ctx.saved_tensors]
            tensors = [t if t.requires_grad else t.requires_grad_() for t in tensors]
            output = dcnv3_reference(tensors[1], tensors[2], tensors[3], Geometry(*ctx.geometry))
            first = torch.autograd.grad(output, tensors[1:], tensors[0], create_graph=True)
            second = torch.autograd.grad(first, tensors, cotangents, create_graph=higher, allow_unused=True)
        return (*second, *(None for _ in ctx.geometry), None)


def _run_backward(grad_output: torch.Tensor, value: torch.Tensor, *rest: Any) -> Gradients:
    # The GPU's deterministic sum is in 64-bit fixed point: enough for float32, not for float64.
    exact = rest[-1] and value.is_cuda and value.dtype == torch.float64
    return (fallback_backward if exact else torch.ops.dcnv3.backward)(grad_output, value, *rest)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.geometry = inputs[3:]


def _gradient(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    value, offset, mask = ctx.saved_tensors  # once: activation checkpointing unpacks them once only
    # create_graph=True: the kernels have no derivatives of their own
    backward = _Backward.apply if torch.is_grad_enabled() else _run_backward
    grads = backward(grad_output, value, offset, mask, *ctx.geometry, deterministic)
    return (*grads, *(None for _ in ctx.geometry))


torch.library.register_autograd("dcnv3::forward", _gradient, setup_context=_setup_context, lib=_LIBRARY)


def autocast(device: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`tensors` in the dtype of the autocast that is on for `device`; float64 stays, and all stay where none is on."""
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _autocast_forward(device: str) -> Any:
    key = torch._C.DispatchKey.AutocastCUDA if device == "cuda" else torch._C.DispatchKey.AutocastCPU

    def kernel(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *geometry: Any) -> torch.Tensor:
        cast = autocast(device, value, offset, mask)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return torch.ops.dcnv3.forward(*cast, *geometry)

    return kernel


_LIBRARY.impl("forward", _autocast_forward("cpu"), "AutocastCPU")
_LIBRARY.impl("forward", _autocast_forward("cuda"), "AutocastCUDA")
