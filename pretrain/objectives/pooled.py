"""What one view's pooled vector must find in another view of its image: cosine (BYOL, SimSiam) and InfoNCE (SimCLR).

The heads have the papers' BatchNorm, over all ranks. A deep encoder that has learned nothing gives every picture nearly
one vector (measured: standard deviation .008 of unit vectors); with LayerNorm in its place the targets stay there, and
predicting them well tells nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.objectives.collectives import gather_rows, mean_over_ranks, rank
from pretrain.objectives.losses import full


class BatchNorm(nn.Module):
    """[B, D] -> [B, D] with the statistics of the rows of all ranks, in training and after: a head is dropped with
    pretraining, and no running average is kept. Every rank has as many rows.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = full(x)
        centred = wide - mean_over_ranks(wide.mean(0))
        variance = mean_over_ranks(centred.square().mean(0))
        return (centred * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


class PooledMLP(nn.Sequential):
    """Projector and predictor of pooled vectors (BYOL, MoCo v3, SimCLR): Linear, BatchNorm, GELU, Linear."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__(nn.Linear(width, dim), BatchNorm(dim), nn.GELU(), nn.Linear(dim, dim))


def cosine_loss(query: Tensor, target: Tensor) -> Tensor:
    """BYOL (Grill et al. 2020, equation 2): 2 - 2 cos of unit vectors [B, D], mean over rows."""
    return (2 - 2 * (query * target).sum(-1)).mean()


def symmetric_cosine_loss(predictions: Tensor, projections: Tensor) -> Tensor:
    """SimSiam (Chen and He 2021, arXiv 2011.10566, equation 2): -1/2 cos(p1, z2) - 1/2 cos(p2, z1), no gradient to z.

    predictions, projections: unit [2, B, D], view by view.
    """
    target = projections.detach().flip(0)
    return -(predictions * target).sum(-1).mean()


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """SimCLR (Chen et al. 2020, arXiv 2002.05709, equation 1): each of the 2 B views of all ranks must find the other
    view of its image among all other 2 B - 1. first, second: unit [B, D] of equal B on every rank. This rank's mean.
    """
    rows = torch.cat([first, second])
    columns = gather_rows(torch.stack([first, second], dim=1)).unbind(1)
    every = torch.cat(columns)
    total, count = len(columns[0]), len(first)
    own = torch.arange(count, device=rows.device) + rank() * count
    itself, positive = torch.cat([own, own + total]), torch.cat([own + total, own])
    logits = (rows @ every.T / temperature).scatter(1, itself[:, None], torch.finfo(rows.dtype).min)
    return F.cross_entropy(logits, positive)
