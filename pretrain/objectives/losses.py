"""The distances: each a plain function of tensors, in fp32 (or fp64 where that is given), returning what is averaged
later.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.objectives.collectives import summed, world_size


def full(x: Tensor) -> Tensor:
    """At least fp32: losses, logits and statistics are never taken in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unit(x: Tensor) -> Tensor:
    return F.normalize(full(x), dim=-1)


@torch.no_grad()
def correlations(targets: list[Tensor]) -> list[Tensor]:
    """C = E[t t^T] over the tokens of all ranks, [D, D], of each of the targets [B, N, D] (equal B and N on every
    rank; one all-reduce).
    """
    flat = [target.flatten(0, -2) for target in targets]
    local = torch.stack([t.T @ t / (t.shape[0] * world_size()) for t in flat])
    return list(summed(local).unbind(0))


def dense_loss(prediction: Tensor, target: Tensor, c: Tensor | None, decorrelation: float) -> tuple[Tensor, Tensor]:
    """SiameseIM's loss (section 3) as its two terms: |p - t|^2 / D and lambda p^T C p / D, averaged over samples and
    tokens.

    prediction, target: [B, N, D]; c: [D, D] from `correlations`, no gradient (None only where decorrelation is 0). (p
    C) . p equals the sum over all pairs of tokens that the paper writes, without the N x N matrix.
    """
    dim = prediction.shape[-1]
    p = full(prediction)
    positive = (p - target).square().sum(-1).mean() / dim
    if c is None or decorrelation == 0:
        return positive, torch.zeros_like(positive)
    negative = ((p @ c) * p).sum(-1).mean() * (decorrelation / dim)
    return positive, negative


def category_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Softmax cross-entropy [B] with label smoothing. targets: int64 [B] class indices (-1 where not valid), or
    [B, K] shares.
    """
    logits = full(logits)
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets.clamp_min(0), reduction="none", label_smoothing=smoothing)
    return F.cross_entropy(logits, targets.to(logits.dtype), reduction="none", label_smoothing=smoothing)
