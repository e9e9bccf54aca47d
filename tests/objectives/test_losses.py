"""Distances against their definitions written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.objectives import losses
from pretrain.objectives.contrastive import LogitScale, info_nce, text_hash
from pretrain.objectives.metrics import content_share, feature_std, rank_me, rank_one_loss


def unit_targets(kind: str, count: int = 4096, dim: int = 16) -> torch.Tensor:
    """[1, N, D] of squared norm D: isotropic, or all along one direction."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    if kind == "rank 1":
        t = t[:1].expand(count, dim)
    t = t / t.norm(dim=-1, keepdim=True) * dim**0.5
    return t[None]


def test_the_dense_loss_equals_the_sum_over_all_pairs_of_tokens():
    generator = torch.Generator().manual_seed(1)
    p, t = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
    (c,) = losses.correlations([t])
    positive, negative = losses.dense_loss(p, t, c, 0.02)
    flat_p, flat_t = p.flatten(0, 1), t.flatten(0, 1)
    pairs = sum(float(a @ b) ** 2 for a in flat_p for b in flat_t) / (15 * 15)
    assert positive.item() == pytest.approx(((p - t) ** 2).sum().item() / 15 / 8, rel=1e-12)
    assert negative.item() == pytest.approx(0.02 * pairs / 8, rel=1e-12)


@pytest.mark.parametrize("kind", ["decorrelated", "rank 1"])
def test_the_least_dense_loss_is_the_one_that_the_alarm_expects(kind):
    t = unit_targets(kind)
    (c,) = losses.correlations([t])
    dim, decorrelation = t.shape[-1], 0.02
    best = t @ torch.linalg.inv(torch.eye(dim, dtype=t.dtype) + decorrelation * c)
    p = best.clone().requires_grad_()
    loss = sum(losses.dense_loss(p, t, c, decorrelation))
    loss.backward()
    assert p.grad.abs().max() < 1e-12, "it is a minimum"
    expected = decorrelation / (1 + decorrelation) if kind == "decorrelated" else rank_one_loss(decorrelation, dim)
    assert loss.item() == pytest.approx(expected, rel=5e-3)
    assert rank_one_loss(0.02, 768) == pytest.approx(0.94, abs=2e-3)


def test_collapse_statistics_of_known_features():
    t = unit_targets("decorrelated")
    (c,) = losses.correlations([t])
    assert feature_std(t) == pytest.approx(1, abs=0.01)
    assert rank_me(c) == pytest.approx(16, rel=0.01)
    flat = t[0] / 16**0.5
    singular = torch.linalg.svdvals(flat)
    share = singular / singular.sum()
    assert rank_me(c).item() == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-6)
    constant = unit_targets("rank 1")
    assert feature_std(constant) < 1e-6
    assert rank_me(losses.correlations([constant])[0]) == pytest.approx(1, abs=1e-3)
    only_position = t[:, :64].expand(8, 64, 16)
    assert content_share(only_position) < 1e-12
    only_content = t[0, :512, None].expand(512, 4, 16)
    assert content_share(only_content) == pytest.approx(1, abs=0.01)


def test_contrast_is_cross_entropy_over_allowed_columns_and_never_loses_the_positive():
    generator = torch.Generator().manual_seed(2)
    rows, columns = F.normalize(torch.randn(2, 5, 7, generator=generator, dtype=torch.float64), dim=-1)
    excluded = torch.rand(5, 5, generator=generator) < 0.4
    excluded[2] = True  # nothing but the positive is left: a loss of 0
    values, hits = info_nce(rows, columns, 3.0, excluded)
    for i in range(5):
        allowed = [j for j in range(5) if j == i or not excluded[i, j]]
        exponentials = [math.exp(3 * float(rows[i] @ columns[j])) for j in allowed]
        own = math.exp(3 * float(rows[i] @ columns[i]))
        assert values[i].item() == pytest.approx(-math.log(own / sum(exponentials)), abs=1e-12)
        assert hits[i].item() == (own == max(exponentials))
    assert values[2] == 0 and hits[2]


def test_equal_captions_and_only_those_hash_alike():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 49408, (500, 77), generator=generator)
    tokens[400] = tokens[3]
    tokens[401] = tokens[3].roll(1)
    hashes = text_hash(tokens).tolist()
    assert hashes[400] == hashes[3] and len(set(hashes)) == 499


def test_the_logit_scale_stops_at_100_and_still_comes_back():
    scale = LogitScale(0.07)
    assert scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    with torch.no_grad():
        scale.log.fill_(6.0)
    assert scale().item() == pytest.approx(100, rel=1e-5)
    (scale() * 2).sum().backward()
    assert scale.log.grad.item() == pytest.approx(200, rel=1e-5), "a step down is taken"
    scale.log.grad = None
    (scale() * -2).sum().backward()
    assert scale.log.grad.item() == 0, "a step further up is not"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_category_loss_of_indices_equals_that_of_their_shares(smoothing):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    target = (1 - smoothing) * F.one_hot(labels, 5) + smoothing / 5
    expected = -(target * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(losses.category_loss(logits, labels, smoothing), expected)
    torch.testing.assert_close(losses.category_loss(logits, F.one_hot(labels, 5), smoothing), expected)


def test_losses_are_never_taken_in_half_precision():
    assert losses.full(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert losses.full(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert (
        losses.category_loss(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1]), 0.1).dtype == torch.float32
    )
