"""`torch.ops.dcnv3`: schemas, fake kernels, autograd, autocast, and PyTorch's own arithmetic where no kernel is built.

    dcnv3::forward(value, offset, mask, <geometry>) -> output
    dcnv3::backward(grad_output, value, offset, mask, <geometry>, deterministic) -> (grad_value, grad_offset, grad_mask)

    dcnv3::packed_forward(value, packed, <geometry>, center) -> output
    dcnv3::packed_backward(grad_output, value, packed, <geometry>, center, deterministic) -> (grad_value, grad_packed)

`packed` holds offsets, logits and the centre's logits in one tensor (`dcnv3.reference.unpack`), as one matrix product
gives them, and its gradient is one tensor too. The compiled extensions (or Triton) register the CPU and CUDA kernels
over these. What they leave out is made below: of the packed pair by the plain pair's kernels, of the plain pair by the
definition, so that an exported program loads anywhere. The activated mask is never stored: backward computes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from dcnv3.geometry import Geometry
from dcnv3.reference import dcnv3_reference, mix, packed_reference, unpack

_GEOMETRY = (
    "int groups, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w, "
    "int dilation_h, int dilation_w, float offset_scale, bool remove_center, int activation"
)
_LIBRARY = torch.library.Library("dcnv3", "DEF")
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Operator(NamedTuple):
    """A forward of `tensors` tensors and its backward. `definition` is the forward in differentiable PyTorch."""

    tensors: int
    forward: Callable[..., torch.Tensor]
    backward: Callable[..., tuple[torch.Tensor, ...]]
    definition: Callable[..., torch.Tensor]


def _define(prefix: str, tensors: str, rest: str, definition: Callable[..., torch.Tensor]) -> _Operator:
    """Define both operators of a pair, and what needs no kernel: fakes, autograd, autocast."""
    count = len(tensors.split(","))
    gradients = ", ".join(["Tensor"] * count)
    _LIBRARY.define(f"{prefix}forward({tensors}, {rest}) -> Tensor")
    _LIBRARY.define(f"{prefix}backward(Tensor grad_output, {tensors}, {rest}, bool deterministic) -> ({gradients})")
    torch.library.register_fake(f"dcnv3::{prefix}forward", _fake_forward, lib=_LIBRARY)
    torch.library.register_fake(f"dcnv3::{prefix}backward", _fake_backward, lib=_LIBRARY)
    forward = getattr(torch.ops.dcnv3, f"{prefix}forward").default
    backward = getattr(torch.ops.dcnv3, f"{prefix}backward").default
    operator = _Operator(count, forward, backward, definition)
    _LIBRARY.impl(f"{prefix}forward", _with_gradient(operator), "Autograd")
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _LIBRARY.impl(f"{prefix}forward", _with_autocast(operator, device), key)
    return operator


def _fake_forward(value: torch.Tensor, *rest: Any) -> torch.Tensor:
    n, height, width, channels = value.shape
    geometry = [argument for argument in rest if not isinstance(argument, torch.Tensor)][: len(Geometry._fields)]
    return value.new_empty((n, *Geometry(*geometry).output_size(height, width), channels))


def _fake_backward(_grad_output: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in arguments if isinstance(t, torch.Tensor))


def _with_gradient(operator: _Operator) -> Callable[..., torch.Tensor]:
    # torch.library.register_autograd does the same in three times the time, more than small maps take to compute.
    def kernel(*arguments: Any) -> torch.Tensor:
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return operator.definition(*arguments)  # torch.func's transforms and forward mode need PyTorch's own steps
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return _Forward.apply(operator, arguments[operator.tensors :], *arguments[: operator.tensors])
        with _BelowAutograd():
            return operator.forward(*arguments)

    return kernel


def _with_autocast(operator: _Operator, device: str) -> Callable[..., torch.Tensor]:
    def kernel(*arguments: Any) -> torch.Tensor:
        cast = autocast(device, *arguments[: operator.tensors])
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operator.forward(*cast, *arguments[operator.tensors :])

    return kernel


def autocast(device: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`tensors` in the dtype of the autocast that is on for `device`; float64 stays, and all stay where none is on."""
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


class _Forward(torch.autograd.Function):
    """An operator's forward, whose derivative is its backward."""

    @staticmethod
    def forward(ctx: Any, operator: _Operator, rest: tuple[Any, ...], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.operator, ctx.rest = operator, rest
        with _BelowAutograd():
            return operator.forward(*tensors, *rest)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        rest = (*ctx.rest, torch.are_deterministic_algorithms_enabled())
        if torch.is_grad_enabled():  # create_graph=True: the kernels have no derivatives of their own
            grads = _Backward.apply(ctx.operator, rest, *cotangents, *ctx.saved_tensors)
        else:
            grads = _run_backward(ctx.operator, *cotangents, *ctx.saved_tensors, *rest)
        return (None, None, *grads)


class _Backward(torch.autograd.Function):
    """A backward where it has to have derivatives: the kernel's numbers, differentiated as the definition is."""

    @staticmethod
    def forward(
        ctx: Any, operator: _Operator, rest: tuple[Any, ...], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.operator, ctx.rest = operator, rest[:-1]
        return _run_backward(operator, *tensors, *rest)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        higher = torch.is_grad_enabled()  # third derivatives are wanted too
        with torch.enable_grad():
            # a view is a place of its own in the graph: what the tensors have in common is left to autograd
            tensors = [t.view_as(t) if higher and t.requires_grad else t.detach() for t in ctx.saved_tensors]
            tensors = [t if t.requires_grad else t.requires_grad_() for t in tensors]
            output = ctx.operator.definition(*tensors[1:], *ctx.rest)
            first = torch.autograd.grad(output, tensors[1:], tensors[0], create_graph=True)
            second = torch.autograd.grad(first, tensors, cotangents, create_graph=higher, allow_unused=True)
        return (None, None, *second)


def _run_backward(
    operator: _Operator, grad_output: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    # The GPU's deterministic sum is in 64-bit fixed point: enough for float32, not for float64.
    if rest[-1] and value.is_cuda and value.dtype == torch.float64:
        return _by_definition(operator.definition, grad_output, value, *rest)
    return operator.backward(grad_output, value, *rest)


def _by_definition(
    definition: Callable[..., torch.Tensor], grad_output: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    *rest, _deterministic = (argument for argument in arguments if not isinstance(argument, torch.Tensor))
    leaves = [t.detach().requires_grad_() for t in arguments if isinstance(t, torch.Tensor)]
    with torch.enable_grad():
        output = definition(*leaves, *rest)
    return tuple(grad.contiguous() for grad in torch.autograd.grad(output, leaves, grad_output))


def _forward(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *geometry: Any) -> torch.Tensor:
    return dcnv3_reference(value, offset, mask, Geometry(*geometry))


def fallback_backward(grad_output: torch.Tensor, *arguments: Any) -> Gradients:
    """`dcnv3::backward` by the definition's own derivatives."""
    grad_value, grad_offset, grad_mask = _by_definition(_forward, grad_output, *arguments)
    return grad_value, grad_offset, grad_mask


def _packed_definition(value: torch.Tensor, packed: torch.Tensor, *rest: Any) -> torch.Tensor:
    *geometry, center = rest
    return packed_reference(value, packed, Geometry(*geometry), center)


def packed_forward(value: torch.Tensor, packed: torch.Tensor, *rest: Any) -> torch.Tensor:
    """`dcnv3::packed_forward` by the plain kernel of the device."""
    *geometry, center = rest
    offset, mask, share = unpack(packed, Geometry(*geometry), center)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        sampled = PLAIN.forward(value, offset, mask, *geometry)
    return sampled if share is None else mix(sampled, value, share)


def packed_backward(
    grad_output: torch.Tensor, value: torch.Tensor, packed: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dcnv3::packed_backward` by the plain kernels of the device, which sample again for the centre's share."""
    *geometry, center, deterministic = rest
    offset, mask, share = unpack(packed, Geometry(*geometry), center)
    tensors = (value, offset, mask, *geometry)
    padding = packed.new_zeros(*packed.shape[:-1], packed.shape[-1] - Geometry(*geometry).places(center))
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        if share is None:
            grad_value, grad_offset, grad_mask = _run_backward(PLAIN, grad_output, *tensors, deterministic)
            return grad_value, torch.cat([grad_offset, grad_mask, padding], -1)
        groups = (share.shape[-1], -1)
        s = share.sigmoid().unsqueeze(-1)
        grad = grad_output.unflatten(-1, groups)
        kept = grad * (1 - s)
        apart = (value - PLAIN.forward(*tensors)).unflatten(-1, groups)
        grad_value, grad_offset, grad_mask = _run_backward(PLAIN, kept.flatten(-2), *tensors, deterministic)
        grad_share = ((kept * apart).sum(-1, keepdim=True) * s).squeeze(-1)
        return grad_value + (grad * s).flatten(-2), torch.cat([grad_offset, grad_mask, grad_share, padding], -1)


PLAIN = _define("", "Tensor value, Tensor offset, Tensor mask", _GEOMETRY, _forward)
PACKED = _define("packed_", "Tensor value, Tensor packed", f"{_GEOMETRY}, bool center", _packed_definition)


def register(
    key: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    packed_forward: Callable[..., Any],
    packed_backward: Callable[..., Any],
) -> None:
    """Kernels in Python for a dispatch key, over the fallback; the extensions register theirs when they are loaded."""
    _LIBRARY.impl("forward", forward, key)
    _LIBRARY.impl("backward", backward, key)
    _LIBRARY.impl("packed_forward", packed_forward, key)
    _LIBRARY.impl("packed_backward", packed_backward, key)


register("CompositeExplicitAutograd", _forward, fallback_backward, packed_forward, packed_backward)
