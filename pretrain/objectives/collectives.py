"""Sums and gathers over the ranks of the default process group; the identity where there is one process.

Convention for losses. A data-parallel engine averages gradients over ranks, so every loss here is scaled such that its
mean over the ranks is the loss of the joined batch. A sum over local rows divided by a global count is therefore
multiplied by the number of ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def summed(x: Tensor) -> Tensor:
    """The sum of `x` over ranks; no gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def largest(x: Tensor) -> Tensor:
    """The element-wise maximum of `x` over ranks; no gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def share_of_joined_mean(mean: Tensor, count: Tensor) -> Tensor:
    """This rank's share (see the convention above) of the joined mean, from the mean of its own `count` items; a mean
    of no items, which is nan, counts as 0.
    """
    count = count.to(mean.dtype)
    return torch.nan_to_num(mean) * (count * world_size() / summed(count).clamp_min(1))


def gather_rows(x: Tensor) -> Tensor:
    """[n, ...] of every rank (equal shapes) -> [ranks * n, ...] in rank order, with gradient.

    What another rank's loss says about our rows comes back to us: the backward pass sums over ranks (reduce-scatter).
    """
    return x if world_size() == 1 else _GatherRows.apply(x)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over ranks, with gradient: each rank's loss says something about every rank's `x`."""
    return x if world_size() == 1 else _MeanOverRanks.apply(x)


def global_mean(values: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Mean of the valid rows over all ranks, as this rank's share (see the convention above).

    values: [n], finite also where not valid. valid: bool [n]. count: scalar, the valid rows of all ranks; 0 gives 0
    with zero gradient.
    """
    total = torch.where(valid, values, torch.zeros_like(values)).sum()
    return total * (world_size() / count.clamp_min(1).to(values.dtype))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        own = grad.new_empty(grad.shape[0] // world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return summed(x) / world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return summed(grad) / world_size()
