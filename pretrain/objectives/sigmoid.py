"""The pairwise sigmoid loss of images and texts (SigLIP, Zhai et al. 2023, arXiv 2303.15343, section 3), rank by rank.

    L = -1/|B| sum_ij log sigmoid( z_ij (t x_i . y_j + b) )        z_ij = 1 where j is i's own text, -1 elsewhere

No softmax ties a row's columns together, so that the texts of one rank are looked at, and forgotten, before those of
the next (section 3.3): a rank holds its own n x n logits and one other rank's texts, whatever the number of ranks. The
gradient is formed on the way, for the loss is a sum over blocks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.reading import ImageTextTargets
from pretrain.objectives.collectives import rank, world_size
from pretrain.objectives.contrastive import text_hash
from pretrain.objectives.losses import full, unit
from pretrain.objectives.metrics import Metrics

INITIAL_BIAS, INITIAL_TEMPERATURE = -10.0, 0.1


class Texts(NamedTuple):
    """One rank's texts: unit vectors [n, D], hashes of their words int64 [n], which are captions at all bool [n]."""

    vectors: Tensor
    hashes: Tensor
    valid: Tensor


class Exchange(NamedTuple):
    """How a rank sees the others' texts: `fetch(r)` gives those of rank r; `give_back(r, gradient)` adds up at rank r
    what all ranks found for its texts, [n, D], and returns the sum there.
    """

    ranks: int
    own: int
    fetch: Callable[[int], Texts]
    give_back: Callable[[int, Tensor], Tensor]


def sigmoid_loss(images: Tensor, texts: Texts, scale: Tensor, bias: Tensor, exchange: Exchange | None = None) -> Tensor:
    """This rank's share (its mean over ranks is the loss of the joined batch). images: unit [n, D]; the i-th text is
    the i-th image's own. scale, bias: [1].

    Rows without a caption are neither images nor texts; another picture's equal caption is no negative.
    """
    exchange = exchange or over_ranks(texts)
    loss: Tensor = _Sigmoid.apply(images, texts.vectors, scale, bias, texts, exchange)
    return loss


def over_ranks(texts: Texts) -> Exchange:
    """The exchange over the default process group: rank r's texts are broadcast, their gradients reduced to it."""

    def fetch(source: int) -> Texts:
        if world_size() == 1 or source == rank():
            mine = Texts(*(x.contiguous() for x in texts))
            return _broadcast(mine, source)
        return _broadcast(Texts(*(torch.empty_like(x) for x in texts)), source)

    def give_back(source: int, gradient: Tensor) -> Tensor:
        if world_size() > 1:
            dist.reduce(gradient, source)
        return gradient

    return Exchange(world_size(), rank(), fetch, give_back)


def _broadcast(texts: Texts, source: int) -> Texts:
    if world_size() == 1:
        return texts
    flags = texts.valid.to(torch.uint8)
    for x in (texts.vectors, texts.hashes, flags):
        dist.broadcast(x, source)
    return Texts(texts.vectors, texts.hashes, flags.bool())


def sigmoid_text_loss(
    pooled: Tensor, text: Tensor, scale: Tensor, bias: Tensor, known: ImageTextTargets, metrics: Metrics
) -> Tensor:
    """`sigmoid_loss` of image vectors [k, B, D] (k an image) and text vectors [B, D], averaged over k."""
    texts = Texts(unit(text), text_hash(known.tokens), known.has_text)
    metrics.add("text/logit_scale", lambda: scale[0])
    metrics.add("text/logit_bias", lambda: bias[0])
    return torch.stack([sigmoid_loss(images, texts, scale, bias) for images in unit(pooled)]).mean()


class LogitBias(torch.nn.Module):
    """The learnable bias of all logits."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor([INITIAL_BIAS]))

    def forward(self) -> Tensor:
        """[1], fp32 or better."""
        return full(self.value)


class _Sigmoid(torch.autograd.Function):
    """The loss, with its gradient formed block by block in the forward pass: [n, D] twice and two numbers are kept."""

    @staticmethod
    def forward(ctx, images, vectors, scale, bias, texts: Texts, exchange: Exchange):  # type: ignore[no-untyped-def]
        own_texts = texts._replace(vectors=vectors)
        count = _count(texts.valid, exchange)
        factor = exchange.ranks / count.clamp_min(1).to(images.dtype)
        total, by_image = images.new_zeros(()), torch.zeros_like(images)
        by_text, by_scale, by_bias = torch.zeros_like(vectors), torch.zeros_like(scale), torch.zeros_like(bias)
        for source in range(exchange.ranks):
            other = own_texts if exchange.ranks == 1 else exchange.fetch(source)
            similarity = images @ other.vectors.T
            sign = -torch.ones_like(similarity)
            counted = texts.valid[:, None] & other.valid[None] & (texts.hashes[:, None] != other.hashes[None])
            if source == exchange.own:
                sign.fill_diagonal_(1)
                counted = counted | torch.diag(texts.valid)
            logits = sign * (scale * similarity + bias)
            total += torch.where(counted, -F.logsigmoid(logits), 0).sum()
            slope = torch.where(counted, -sign * torch.sigmoid(-logits), 0)  # of the sum, by the unsigned logit
            by_image += scale * (slope @ other.vectors)
            by_scale += (slope * similarity).sum()
            by_bias += slope.sum()
            returned = exchange.give_back(source, scale * (slope.T @ images))
            if source == exchange.own:
                by_text = returned
        ctx.save_for_backward(*(factor * g for g in (by_image, by_text, by_scale, by_bias)))
        return factor * total

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return *(grad * g for g in ctx.saved_tensors), None, None


def _count(valid: Tensor, exchange: Exchange) -> Tensor:
    """Captions of the joined batch."""
    count = valid.sum()
    if world_size() > 1:
        dist.all_reduce(count)
    elif exchange.ranks > 1:  # ranks that are not there: as many rows each
        count = count * exchange.ranks
    return count
