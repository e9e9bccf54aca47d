"""Linear layers that run through oneDNN on an x86 CPU that is not Intel's.

PyTorch multiplies fp32 matrices on the CPU with MKL, which is written for Intel's processors. On an EPYC with AVX-512
oneDNN, which PyTorch carries as well and uses for convolutions, is as fast or faster at the shapes of InternImage
(benchmarks/models_linear.py: 1.0 to 1.4 times beside torch 2.14, 2.0 to 2.5 times beside other builds). On Intel's
processors MKL stays. The choice is by vendor and not by a trial at the start, since a run that is resumed must round as
it did before. Parameters, names and results (to rounding) are nn.Linear's.
"""

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN_AVAILABLE = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def made_by_intel(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor is Intel's, by the vendor that it reports."""
    try:
        with cpuinfo.open(encoding="ascii", errors="replace") as file:
            return any("GenuineIntel" in line for line in file if line.startswith("vendor_id"))
    except OSError:  # no such file outside Linux
        return "GenuineIntel" in platform.processor()


_CHOSEN = ONEDNN_AVAILABLE and not made_by_intel()
SMALLEST = 1 << 18  # multiply-adds below which the call costs more than the product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. x: [..., K], weight: [N, K], bias: [N] -> [..., N].

    Through oneDNN for fp32 on a CPU that is not Intel's; anything else (other devices and dtypes, autocast, compiling,
    exporting) is F.linear's.
    """
    if (
        _CHOSEN
        and not torch.compiler.is_compiling()  # first: the size below must not become a guard on the batch
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= SMALLEST
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    ):
        return OneDnnLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def use_fast_linears(module: nn.Module) -> None:
    """Replace every plain nn.Linear inside by a Linear that holds the same parameters."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            fast = Linear.__new__(Linear)
            fast.__dict__.update(child.__dict__)
            setattr(module, name, fast)
        else:
            use_fast_linears(child)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] times b [N, K] transposed, plus bias."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class OneDnnLinear(torch.autograd.Function):
    """Differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        rows = x.reshape(-1, x.shape[-1])
        return _product(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        # An expanded gradient, as of a sum, has strides of 0, with which oneDNN takes a hundred times as long.
        gradient = gradients[0].reshape(-1, weight.shape[0]).contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(gradient, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = _sum_over_rows(gradient, x.reshape(-1, x.shape[-1]))
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = gradient.sum(0)
        return grad_x, grad_weight, grad_bias


def _sum_over_rows(gradient: Tensor, rows: Tensor) -> Tensor:
    """gradient [M, N] transposed times rows [M, K]."""
    count, outputs, inputs = len(rows), gradient.shape[1], rows.shape[1]
    # oneDNN copies a transposed first factor. Of long and narrow matrices that costs more than it gains over MKL.
    if count >= 8 * max(outputs, inputs):
        return torch.mm(gradient.t(), rows)
    # The product is faster with the shorter side as its rows.
    if outputs > inputs:
        return _product(rows.t(), gradient.t()).t()
    return _product(gradient.t(), rows.t())
