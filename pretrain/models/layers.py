"""The small layers: norms that are safe in bf16, drop path by sample, the MLP, a BatchNorm over all ranks."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dcnv3 import gelu, gelu_, layer_norm, norm_gelu, residual_norm, split_norm
from pretrain.models.randomness import on_device, uniforms


def initial_std(std: float | None, width: int) -> float:
    """Of a Linear's initial values: `std`, or for None 1 / sqrt(`width` of its input), which keeps the variance."""
    return width**-0.5 if std is None else std


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, eps 1e-6 (the released weights need it; PyTorch's 1e-5 is visibly off).

    The kernels keep statistics in fp32 for half-precision inputs. Autocast would store an fp32 output instead, twice
    the memory for nothing, so it is left out here.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] -> [..., C], same dtype."""
        if x.dtype == self.weight.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            return layer_norm(x, self.weight, self.bias, self.eps)
        with _no_autocast(x):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class NormGelu(LayerNorm):
    """LayerNorm, then GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] -> [..., C], same dtype."""
        if x.dtype == self.weight.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            return norm_gelu(x, self.weight, self.bias, self.eps)
        return F.gelu(super().forward(x))


class SplitNorm(LayerNorm):
    """LayerNorm before a residual branch: gives what it is given too, so that all gradients are added in one pass.

    readers: 1 or 2, how many layers the branch begins with; each is handed LayerNorm(x) of its own.
    """

    def __init__(self, channels: int, eps: float = 1e-6, *, readers: int = 1) -> None:
        super().__init__(channels, eps)
        self.readers = readers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """x: [..., C] -> LayerNorm(x), of every reader, and x."""
        if x.dtype == self.weight.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            return split_norm(x, self.weight, self.bias, self.eps, self.readers)
        return (*[super().forward(x)] * self.readers, x)


class ResidualNorm(LayerNorm):
    """LayerNorm where a residual branch ends: adds what comes out to what the branch is to be added to."""

    def forward(self, x: Tensor, residual: Tensor, factor: Tensor | None) -> Tensor:  # type: ignore[override]
        """x, residual: [B, ..., C]; factor: [B, 1, ...], None for 1 -> residual + factor * LayerNorm(x)."""
        if x.dtype == self.weight.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            factor = None if factor is None else factor.to(x.dtype)
            return residual_norm(x, residual, factor, self.weight, self.bias, self.eps)
        normal = super().forward(x)
        return residual + (normal if factor is None else normal * factor)


class DropPath(nn.Module):
    """Drops a residual branch of a whole sample (Huang et al., "Deep Networks with Stochastic Depth", 2016).

    `drop_path_factors` draws for all layers of a model at once, and a block that is recomputed in the backward pass is
    handed the same factors again. `salt` tells this layer's draws from those of others (see randomness).
    """

    def __init__(self, rate: float, salt: int) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"a drop-path rate lies in [0, 1), not {rate}")
        self.rate, self.salt = rate, salt

    def forward(self, x: Tensor) -> Tensor:
        (factors,) = drop_path_factors([self], x)
        return x if factors is None else x * factors

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}, salt={self.salt}"


def drop_path_factors(layers: Sequence[DropPath], x: Tensor) -> list[Tensor | None]:
    """What each layer multiplies its branch by: [B, 1, 1, 1] for x [B, H, W, C], 0 or 1/(1 - rate), in x's dtype; None
    where nothing is dropped.

    One draw serves all layers, some 40 small kernels whatever their number.
    """
    dropping = [layer.rate > 0 and layer.training for layer in layers]
    active = [layer for layer, drops in zip(layers, dropping, strict=True) if drops]
    if not active:
        return [None] * len(layers)
    rates = torch.tensor([layer.rate for layer in active], dtype=torch.float64)[:, None]
    kept = uniforms(len(x), [layer.salt for layer in active], x.device) >= on_device(rates.float(), x.device)
    # the reciprocal is rounded in the precision that a kernel computes in, and then to x's dtype
    scale = (1 / (1 - rates).to(_at_least_fp32(x.dtype))).to(x.dtype)
    factors = torch.where(kept, on_device(scale, x.device), torch.zeros((), dtype=x.dtype, device=x.device))
    rows = iter(factors.view(*factors.shape, *[1] * (x.ndim - 1)).unbind(0))
    return [next(rows) if drops else None for drops in dropping]


_PART = 1 << 21  # values of the hidden layer that an MLP makes at once on the CPU where no gradient is wanted


class Mlp(nn.Module):
    """Linear, GELU, Linear on the last dimension: [..., C] -> [..., C]."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled() or not x.numel()
        if torch.compiler.is_compiling() or wanted or x.device.type != "cpu" or self._watched():
            return self.fc2(gelu(self.fc1(x)))
        # Nobody sees the hidden layer: made in parts and changed in place, it needs little fresh memory, which the
        # system would have to clear first; at 56 by 56 pixels that takes as long as the layers themselves.
        rows = x.reshape(-1, x.shape[-1])
        parts = rows.split(max(_PART // self.fc1.out_features, 1))
        outputs = [self.fc2(gelu_(self.fc1(part))) for part in parts]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view(*x.shape[:-1], -1)

    def _watched(self) -> bool:
        """Whether a hook may look at a layer's output, or counts on one call of the layer."""
        layers = (self.fc1, self.fc2)
        return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers) or torch.jit.is_tracing()


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients: every rank's output depends on every input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm(nn.Module):
    """BatchNorm over the last dimension with the statistics of the global batch, in fp32 (fp64 for fp64), on any device
    and backend.

    torch's SyncBatchNorm refuses CPU tensors, and its running statistics follow the module into bf16, where a momentum
    of 0.1 rounds away. Entries are BatchNorm's: weight, bias, running_mean, running_var, num_batches_tracked;
    running_var is unbiased. Ranks may hold different numbers of rows.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] -> [..., C], same dtype."""
        with _no_autocast(x):
            exact = x.to(_at_least_fp32(x.dtype))
            mean, variance = self._batch_statistics(exact) if self.training else (self.running_mean, self.running_var)
            scale = self.weight.to(exact.dtype) * torch.rsqrt(variance + self.eps)
            return (exact * scale + (self.bias.to(exact.dtype) - mean * scale)).to(x.dtype)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, -2)
        count = torch.full((1,), float(rows.shape[0]), device=x.device, dtype=rows.dtype)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Mean first, then squared distances to it: the sum of squares would lose what the variance is made of.
            first = _SumOverRanks.apply(torch.cat([rows.sum(0), count]))
            count = first[-1:].detach()
            mean = first[:-1] / count
            variance = _SumOverRanks.apply((rows - mean).square().sum(0)) / count
        else:
            variance, mean = torch.var_mean(rows, 0, correction=0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            unbiased = variance.detach() * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, variance

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GlobalBatchNorm":
        """Running statistics stay fp32 when the module is cast to less: then only the device is taken from `fn`."""
        before = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self, name)
            kept = _at_least_fp32(now.dtype)
            if now.dtype != kept:
                setattr(self, name, value.to(device=now.device, dtype=kept) if not value.is_meta else now.to(kept))
        return self


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
