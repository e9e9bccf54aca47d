"""One map read by several losses, whose gradients there are brought into a fixed proportion.

    backward:   dL/dF = g_0 + sum_i  share_i |g_0| / |g_i|  g_i          |.| over the joined batch of all ranks

g_0 is the gradient of the losses that set the measure (text and category), g_i that of a dense loss. A dense loss of
tokens that are soon predicted well gives a hundredth of the gradient of the others, and a weight that is right at the
start is wrong later; the proportion holds throughout. Below the dense losses' own heads nothing changes but the map's
gradient: their parameters see the loss as it is. (Our choice. GradNorm, Chen et al. 2018, arXiv 1711.02257, equalises
such norms by learning the weights.)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain.objectives.collectives import summed

MOST = 1e4  # a gradient so small that more than this would be needed is left small


def balanced(x: Tensor, shares: Sequence[float], note: Callable[[Tensor], None]) -> tuple[Tensor, ...]:
    """1 + len(shares) aliases of `x`: the first for the losses that set the measure, then one a balanced loss.

    note: given the factors of the balanced losses, [len(shares)], in the backward pass.
    """
    return tuple(_Balance.apply(x, tuple(shares), note))


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shares: tuple[float, ...], note: Callable[[Tensor], None]):  # type: ignore[no-untyped-def]
        ctx.shares, ctx.note = shares, note
        return tuple(x.view_as(x) for _ in range(1 + len(shares)))

    @staticmethod
    def backward(ctx, measure: Tensor, *others: Tensor):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(measure.dtype, torch.float32)
        norms = summed(torch.stack([g.to(wide).square().sum() for g in (measure, *others)])).sqrt()
        shares = norms.new_tensor(ctx.shares)
        factors = torch.where(norms[1:] > 0, shares * norms[0] / norms[1:], torch.zeros_like(shares)).clamp(max=MOST)
        ctx.note(factors)
        total = measure
        for factor, gradient in zip(factors.to(measure.dtype), others, strict=True):
            total = total + factor * gradient
        return total, None, None
