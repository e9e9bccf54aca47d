"""Image vectors against text vectors (CLIP), queries against keys (MoCo): negatives are the whole global batch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.reading import ImageTextTargets
from pretrain.objectives.collectives import gather_rows, global_mean, rank
from pretrain.objectives.losses import full, unit
from pretrain.objectives.metrics import Metrics

MAX_LOGIT_SCALE = 100.0


def info_nce(
    rows: Tensor, columns: Tensor, scale: Tensor | float, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """InfoNCE, one direction: cross-entropy of each row over the columns, [n], and whether the positive wins, bool
    [n].

    rows: unit [n, D]. columns: unit [m, D], those of all ranks in rank order; a row's positive is its own. excluded:
    bool [n, m], pairs that are not negatives (duplicates, columns without a vector); the positive is never excluded.
    """
    positive = torch.arange(len(rows), device=rows.device) + rank() * len(rows)
    logits = rows @ columns.T * scale
    if excluded is not None:
        logits = logits.masked_fill(excluded.scatter(1, positive[:, None], False), torch.finfo(logits.dtype).min)
    return F.cross_entropy(logits, positive, reduction="none"), logits.detach().argmax(1) == positive


def text_loss(pooled: Tensor, text: Tensor, scale: Tensor, known: ImageTextTargets, metrics: Metrics) -> Tensor:
    """Symmetric InfoNCE of image vectors [k, B, D] (k an image) and text vectors [B, D], over all ranks.

    1/2 (CE(g E^T / tau) + CE(E g^T / tau)), averaged over k and over the rows that have a caption. Rows without one are
    neither rows nor columns, and equal captions are not negatives of each other.
    """
    text, images = unit(text), unit(pooled).unbind(0)
    columns = gather_rows(torch.stack([text, *images], dim=1)).unbind(1)
    hashes = text_hash(known.tokens)
    all_hashes, all_valid = gather_rows(torch.stack([hashes, known.has_text.long()], dim=1)).unbind(1)
    excluded = (all_valid == 0)[None] | (hashes[:, None] == all_hashes[None])
    values, hits = [], []
    for image, column in zip(images, columns[1:], strict=True):
        to_text, hit = info_nce(image, columns[0], scale, excluded)
        to_image, _ = info_nce(text, column, scale, excluded)
        values.append((to_text + to_image) / 2)
        hits.append(hit.float())
    count = all_valid.sum()
    metrics.add("text/accuracy", lambda: global_mean(torch.stack(hits).mean(0), known.has_text, count))
    metrics.add("text/logit_scale", lambda: scale[0])
    return global_mean(torch.stack(values).mean(0), known.has_text, count)


def text_hash(tokens: Tensor) -> Tensor:
    """int64 [B] of token rows [B, L]: equal captions have equal hashes, different ones do not (but for 1 in 2^64)."""
    generator = torch.Generator().manual_seed(0x5EED)
    factors = torch.randint(-(2**63), 2**63 - 1, (tokens.shape[1],), generator=generator) | 1
    return (tokens * factors.to(tokens.device)).sum(1)


class LogitScale(torch.nn.Module):
    """The learnable inverse temperature, exp of a parameter, at most 100 (CLIP, section 2.5)."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.log = torch.nn.Parameter(torch.tensor([math.log(1 / temperature)]))

    def forward(self) -> Tensor:
        """[1], fp32 or better."""
        return _Clamped.apply(full(self.log)).exp()


class _Clamped(torch.autograd.Function):
    """min(x, log 100), whose gradient beyond the limit is kept only where a descent step leads back: the scale neither
    sticks nor drifts.
    """

    @staticmethod
    def forward(ctx, log: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        limit = math.log(MAX_LOGIT_SCALE)
        ctx.save_for_backward(log > limit)
        return log.clamp(max=limit)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (beyond,) = ctx.saved_tensors
        return torch.where(beyond & (grad < 0), torch.zeros_like(grad), grad)
