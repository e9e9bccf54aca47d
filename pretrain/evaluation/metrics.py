"""Scores as pure functions of similarities, logits and labels. Ties get what a random order of the tied would get.

A model that has collapsed gives every candidate the same similarity. Sorting would then score whatever the order of the
files gives; here it scores exactly chance.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TypedDict

import torch
from torch import Tensor


class ClassScore(TypedDict):
    value: float
    samples: int


def hits_at_k(similarity: Tensor, relevant: Tensor, k: int) -> Tensor:
    """Probability that one of the k nearest candidates is a right one, for each query.

    Args:
        similarity: [Q, G] float, larger is nearer.
        relevant: [Q, G] bool, the right candidates of each query; at least one each.

    Returns [Q] float64: 0 or 1, and between them only where a right candidate ties across the k-th place: with t
    tied candidates, r of them right, and m places left for them, 1 - C(t-r, m) / C(t, m).

    Raises ValueError for shapes that differ, a query without a right candidate, or similarities that are NaN.
    """
    if similarity.shape != relevant.shape or similarity.dim() != 2:
        raise ValueError(f"similarity {tuple(similarity.shape)} and relevant {tuple(relevant.shape)}: both [Q, G]")
    if k < 1:
        raise ValueError(f"k is {k}: at least 1")
    if similarity.isnan().any():
        raise ValueError("similarities hold NaN: the model's weights or inputs are broken")
    if not relevant.any(1).all():
        raise ValueError("every query needs at least one right candidate")
    best = similarity.masked_fill(~relevant, -math.inf).amax(1, keepdim=True)
    above = (similarity > best).sum(1)
    tied = similarity == best
    return _hit_probability(tied.sum(1), (tied & relevant).sum(1), (k - above).clamp_min(0))


def chance_at_k(right: Tensor, candidates: int, k: int) -> float:
    """Mean of `hits_at_k` when the candidates stand in random order. right: int64 [Q], each query's right ones."""
    places = torch.full_like(right, k)
    return _hit_probability(torch.full_like(right, candidates), right, places).mean().item()


def recall(
    queries: Tensor, gallery: Tensor, query_of: Tensor, gallery_of: Tensor, ks: Sequence[int], *, block: int = 1024
) -> dict[int, tuple[float, float]]:
    """Recall@k and its chance, for each k, in memory of `block` rows of the similarity matrix.

    queries: [Q, D]; gallery: [G, D]; query_of [Q] and gallery_of [G]: a candidate is right where these are equal.
    """
    hits: dict[int, list[Tensor]] = {k: [] for k in ks}
    right = []
    for start in range(0, len(queries), block):
        relevant = query_of[start : start + block, None] == gallery_of[None]
        similarity = queries[start : start + block] @ gallery.T
        right.append(relevant.sum(1))
        for k in ks:
            hits[k].append(hits_at_k(similarity, relevant, k))
    counts = torch.cat(right)
    return {k: (torch.cat(found).mean().item(), chance_at_k(counts, len(gallery), k)) for k, found in hits.items()}


def top_hits(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether the right class is among the k largest logits, ties shared fairly.

    logits: [N, classes]; labels: [N] int64 in [0, classes). Returns [N] float64.
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, logits have {logits.shape[1]} classes"
        )
    return hits_at_k(logits, torch.nn.functional.one_hot(labels, logits.shape[1]).bool(), k)


def per_class(hits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, ClassScore]:
    """Mean of `hits` [N] over the samples of each class that occurs; labels: [N]."""
    return {
        name: ClassScore(value=hits[labels == i].mean().item(), samples=int((labels == i).sum()))
        for i, name in enumerate(classes)
        if (labels == i).any()
    }


def mean_per_class(hits: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the mean of their samples: every class counts alike. hits, labels: [N]."""
    found, index = labels.unique(return_inverse=True)
    sums = torch.zeros(len(found), dtype=torch.float64).index_add_(0, index, hits.double())
    return (sums / torch.bincount(index, minlength=len(found))).mean().item()


def answer_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """int64 [classes, classes]: how many samples of each class (rows) are given each answer (columns).

    logits: [N, classes]; labels: [N] in [0, classes). Of equal logits the first class is the answer.
    """
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes).view(classes, classes)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance between the probability of the answer and how often it is right, over `bins` equal ranges of the
    probability, each counting by its samples (Guo et al. 2017, section 2).

    logits: [N, classes], whose softmax are the probabilities; labels: [N].
    """
    confidence, answer = logits.double().softmax(1).max(1)
    right = (answer == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence)
    return gap.abs().sum().item() / len(labels)


def largest_share(labels: Tensor) -> float:
    """Share of the commonest class: what always answering with it scores. labels: [N]."""
    return torch.bincount(labels).max().item() / len(labels)


def wilson_interval(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion seen in `count` independent samples (Wilson 1927).

    Unlike the normal one it stays in [0, 1] and does not shrink to nothing at 0 and 1.
    """
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"a share in [0, 1] of at least one sample is needed, got {share} of {count}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _hit_probability(candidates: Tensor, right: Tensor, places: Tensor) -> Tensor:
    """1 - C(candidates - right, places) / C(candidates, places), elementwise, in float64 over log-gamma."""
    t, r, m = candidates.double(), right.double(), torch.minimum(places, candidates).double()
    certain = m > t - r  # more places than wrong candidates
    wrong = (t - r - m).clamp_min(0)
    log_miss = torch.lgamma(t - r + 1) - torch.lgamma(wrong + 1) - torch.lgamma(t + 1) + torch.lgamma(t - m + 1)
    miss = torch.where(certain, 0.0, log_miss.exp())
    return torch.where(m == 0, 0.0, 1 - torch.where((r == 1) & ~certain, 1 - m / t, miss))
