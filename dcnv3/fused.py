"""LayerNorm, LayerNorm with GELU, and GELU: kernels of fewer passes than PyTorch's, where they are built.

    dcnv3::norm_forward(x, weight, bias, eps, gelu) -> (output, mean, rstd)
    dcnv3::norm_residual(x, residual, factor?, weight, bias, eps)     likewise, with residual + factor * norm for output
    dcnv3::norm_backward(grad_output, x, weight, bias, mean, rstd, gelu) -> (grad_x, grad_weight, grad_bias)
    dcnv3::norm_backward_split(grad_output, grad_again?, grad_residual, x, ..., rstd)     likewise, of grad_output +
        grad_again, and with grad_residual added to grad_x
    dcnv3::norm_backward_scaled(grad_output, factor, x, ..., rstd)    likewise, of factor * grad_output
    dcnv3::gelu(x) -> output
    dcnv3::gelu_(x!)
    dcnv3::gelu_backward(grad_output, x) -> grad_x

Where there is no kernel (another device, an extension built before these operators were, mixed dtypes), under autocast,
`torch.func` and forward mode, and while a model is compiled or exported, the layers below are those of `composed`,
PyTorch's own operators, which compilers fuse themselves. Second derivatives are those of PyTorch's operators too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from dcnv3 import composed

_LIBRARY = torch.library.Library("dcnv3", "FRAGMENT")
_LIBRARY.define(
    "norm_forward(Tensor x, Tensor weight, Tensor bias, float eps, bool gelu) -> "
    "(Tensor output, Tensor mean, Tensor rstd)"
)
_LIBRARY.define(
    "norm_residual(Tensor x, Tensor residual, Tensor? factor, Tensor weight, Tensor bias, float eps) -> "
    "(Tensor output, Tensor mean, Tensor rstd)"
)
for _name, _given, _last in (
    ("norm_backward", "", ", bool gelu"),
    ("norm_backward_split", "Tensor? grad_again, Tensor grad_residual, ", ""),
    ("norm_backward_scaled", "Tensor factor, ", ""),
):
    _LIBRARY.define(
        f"{_name}(Tensor grad_output, {_given}Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd{_last}) "
        "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
    )
_LIBRARY.define("gelu(Tensor x) -> Tensor")
_LIBRARY.define("gelu_(Tensor(a!) x) -> ()")
_LIBRARY.define("gelu_backward(Tensor grad_output, Tensor x) -> Tensor")

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.register_fake("dcnv3::norm_residual", lib=_LIBRARY)
@torch.library.register_fake("dcnv3::norm_forward", lib=_LIBRARY)
def _fake_norm_forward(x: torch.Tensor, *_: Any) -> Three:
    kept = torch.promote_types(x.dtype, torch.float32)
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=kept), x.new_empty(rows, dtype=kept)


@torch.library.register_fake("dcnv3::norm_backward", lib=_LIBRARY)
def _fake_norm_backward(_grad_output: torch.Tensor, *tensors: Any) -> Three:
    x, weight, bias = (t.new_empty(t.shape) for t in tensors[:3])
    return x, weight, bias


@torch.library.register_fake("dcnv3::norm_backward_scaled", lib=_LIBRARY)
def _fake_norm_backward_scaled(grad_output: torch.Tensor, _factor: torch.Tensor, *tensors: Any) -> Three:
    return _fake_norm_backward(grad_output, *tensors)


@torch.library.register_fake("dcnv3::norm_backward_split", lib=_LIBRARY)
def _fake_norm_backward_split(grad_output: torch.Tensor, _again: Any, _residual: torch.Tensor, *tensors: Any) -> Three:
    return _fake_norm_backward(grad_output, *tensors)


@torch.library.register_fake("dcnv3::gelu", lib=_LIBRARY)
def _fake_gelu(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("dcnv3::gelu_", lib=_LIBRARY)
def _fake_gelu_in_place(_x: torch.Tensor) -> None:
    return None


@torch.library.register_fake("dcnv3::gelu_backward", lib=_LIBRARY)
def _fake_gelu_backward(_grad_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension. x: [..., C], weight, bias: [C] -> [..., C].

    Statistics are kept in float32 for 16-bit types.
    """
    return _norm(x, weight, bias, eps, False)


def norm_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """GELU(layer_norm(x)), the exact GELU, by the error function."""
    return _norm(x, weight, bias, eps, True)


def split_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, readers: int = 1
) -> tuple[torch.Tensor, ...]:
    """layer_norm(x) for one reader or two, and x: for a residual branch, and what it is added to.

    The gradients of all of them are added in one pass. Three tensors where there are two readers, else two; they share
    memory and are not to be changed in place.
    """
    if readers in (1, 2) and _served("norm_backward_split", x, weight, bias) and _fits(x):
        return _SplitNorm.apply(x, weight, bias, eps, readers)
    return composed.split_norm(x, weight, bias, eps, readers)


def residual_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """residual + factor * layer_norm(x), where a branch ends. x, residual: [B, ..., C]; factor: [B, 1, ...] or None."""
    given = (x, weight, bias, residual) if factor is None else (x, weight, bias, residual, factor)
    if _served("norm_residual", *given) and _fits(x) and x.shape == residual.shape and _is_of_samples(factor, x):
        return _ResidualNorm.apply(x, residual, factor, weight, bias, eps)
    return composed.residual_norm(x, residual, factor, weight, bias, eps)


def joined_linears(
    weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One weight and one bias of several linear layers, by one copy. [P1, C], ...; [P1], ... -> [P, C], [P]."""
    first, tensors = weights[0], (*weights, *biases)
    alike = all(t.dtype == first.dtype for t in tensors) and all(w.shape[1:] == first.shape[1:] for w in weights)
    if _eager() and alike and [b.shape for b in biases] == [w.shape[:1] for w in weights]:
        return _Joined.apply(len(weights), *tensors)
    return composed.joined_linears(weights, biases)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The exact GELU, by the error function. [...] -> [...]."""
    # PyTorch's own is the faster one in float64
    if x.dtype != torch.float64 and _served("gelu", x):
        return _Gelu.apply(x)
    return composed.gelu(x)


def gelu_(x: torch.Tensor) -> torch.Tensor:
    """`gelu` in x's own memory, where no gradient is wanted. [...] -> x."""
    if x.dtype != torch.float64 and x.is_contiguous() and _served("gelu_", x):
        torch.ops.dcnv3.gelu_(x)
        return x
    return composed.gelu_(x)


class NormGelu(composed.NormGelu):
    """LayerNorm over the last dimension, then GELU: [..., C] -> [..., C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm_gelu(x, self.weight, self.bias, self.eps)


_KEYS = {"cpu": "CPU", "cuda": "CUDA"} if os.environ.get("DCNV3_CUDA_NORMS") == "1" else {"cpu": "CPU"}
_BUILT: dict[tuple[str, str], bool] = {}


def built(name: str, device: str) -> bool:
    """Whether an extension that is loaded has a kernel of `dcnv3::name` for the device that may be taken there."""
    if (name, device) not in _BUILT:
        key = _KEYS.get(device)
        found = key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"dcnv3::{name}", key)
        _BUILT[name, device] = found
    return _BUILT[name, device]


def _served(name: str, x: torch.Tensor, *others: torch.Tensor) -> bool:
    return (
        _eager()
        and built(name, x.device.type)
        and x.is_floating_point()
        and all(t.dtype == x.dtype and t.device == x.device for t in others)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _eager() -> bool:
    """Whether a function with a backward pass of its own may run: nobody traces it, nor asks for other derivatives."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


_MOST_BYTES = 40 * 1024 // 3  # of a row in the type of the arithmetic: CUDA's backward keeps three in shared memory


def _fits(x: torch.Tensor) -> bool:
    return not x.is_cuda or x.shape[-1] * max(x.element_size(), 4) <= _MOST_BYTES


def _is_of_samples(factor: torch.Tensor | None, x: torch.Tensor) -> bool:
    """Whether it is None, or a constant for each of x's samples."""
    if factor is None:
        return True
    return factor.shape == (len(x), *[1] * (x.dim() - 1)) and len(x) > 0 and not factor.requires_grad


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, then_gelu: bool) -> torch.Tensor:
    if _served("norm_forward", x, weight, bias) and _fits(x):
        return _Norm.apply(x, weight, bias, eps, then_gelu)
    return _composed(x, weight, bias, eps, then_gelu)


def _composed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, then_gelu: bool) -> torch.Tensor:
    return (composed.norm_gelu if then_gelu else composed.layer_norm)(x, weight, bias, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, then_gelu: bool
    ) -> torch.Tensor:
        output, mean, rstd = torch.ops.dcnv3.norm_forward(x, weight, bias, eps, then_gelu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps, ctx.then_gelu = eps, then_gelu
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the kernel has no derivative of its own
            return (*_composed_gradients(cotangents[0], x, weight, bias, ctx.eps, ctx.then_gelu), None, None)
        return (*torch.ops.dcnv3.norm_backward(*cotangents, x, weight, bias, mean, rstd, ctx.then_gelu), None, None)


def _composed_gradients(
    cotangent: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, then_gelu: bool
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, weight and bias that can be differentiated again."""
    # a view is a place of its own in the graph: what the tensors have in common is left to autograd
    places = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (x, weight, bias)]
    output = _composed(places[0], places[1], places[2], eps, then_gelu)
    return torch.autograd.grad(output, places, cotangent, create_graph=True)


class _SplitNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, readers: int
    ) -> tuple[torch.Tensor, ...]:
        output, mean, rstd = torch.ops.dcnv3.norm_forward(x, weight, bias, eps, False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return (output, x) if readers == 1 else (output, output.detach(), x)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad_output, *again, grad_residual = cotangents
        if torch.is_grad_enabled():
            grad_x, *others = _composed_gradients(sum(again, grad_output), x, weight, bias, ctx.eps, False)
            return (grad_x + grad_residual, *others, None, None)
        given = grad_output, again[0] if again else None, grad_residual, x, weight, bias, mean, rstd
        return (*torch.ops.dcnv3.norm_backward_split(*given), None, None)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        factor: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        factor = None if factor is None else factor.contiguous()
        output, mean, rstd = torch.ops.dcnv3.norm_residual(x, residual, factor, weight, bias, eps)
        ctx.save_for_backward(x, factor, weight, bias, mean, rstd)
        ctx.eps = eps
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        x, factor, weight, bias, mean, rstd = ctx.saved_tensors
        (grad,) = cotangents
        if torch.is_grad_enabled():
            scaled = grad if factor is None else grad * factor
            grad_x, *others = _composed_gradients(scaled, x, weight, bias, ctx.eps, False)
        elif factor is None:
            grad_x, *others = torch.ops.dcnv3.norm_backward(grad, x, weight, bias, mean, rstd, False)
        else:
            grad_x, *others = torch.ops.dcnv3.norm_backward_scaled(grad, factor, x, weight, bias, mean, rstd)
        return (grad_x, grad, None, *others, None)


class _Joined(torch.autograd.Function):
    """Gradients are parts of those of the whole, in place."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.rows = [len(weight) for weight in tensors[:count]]
        whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
        rows, width = sum(ctx.rows), tensors[0].shape[1]
        return whole[: rows * width].view(rows, width), whole[rows * width :]

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *(part for cotangent in cotangents for part in cotangent.split(ctx.rows)))


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.ops.dcnv3.gelu(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: PyTorch's own has a derivative
            return torch.ops.aten.gelu_backward(*cotangents, x)
        return torch.ops.dcnv3.gelu_backward(*cotangents, x)
