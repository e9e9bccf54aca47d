"""Metrics against brute force, torchmetrics and closed forms."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix
from torchmetrics.functional.retrieval import retrieval_hit_rate

from pretrain.evaluation.classification import answers
from pretrain.evaluation.metrics import (
    answer_counts,
    chance_at_k,
    expected_calibration_error,
    hits_at_k,
    largest_share,
    mean_per_class,
    per_class,
    recall,
    top_hits,
    wilson_interval,
)


def brute_force(similarity: list[float], relevant: list[bool], k: int) -> float:
    """Share of the orders, among those that respect the similarities, with a right one in the first k."""
    orders = [
        o
        for o in itertools.permutations(range(len(similarity)))
        if all(similarity[a] >= similarity[b] for a, b in itertools.pairwise(o))
    ]
    return sum(any(relevant[i] for i in o[:k]) for o in orders) / len(orders)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ties_get_the_mean_over_all_orders_of_the_tied(data):
    size = data.draw(st.integers(1, 6))
    similarity = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=size, max_size=size))
    relevant = data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    k = data.draw(st.integers(1, 7))
    got = hits_at_k(torch.tensor([similarity]), torch.tensor([relevant]), k).item()
    assert got == pytest.approx(brute_force(similarity, relevant, k), abs=1e-12)


def test_without_ties_it_is_the_hit_rate_of_torchmetrics():
    torch.manual_seed(0)
    similarity, relevant = torch.randn(50, 30), torch.rand(50, 30) < 0.1
    relevant[:, 0] |= ~relevant.any(1)
    for k in (1, 5, 10):
        expected = [retrieval_hit_rate(s, r, top_k=k).item() for s, r in zip(similarity, relevant, strict=True)]
        assert hits_at_k(similarity, relevant, k).tolist() == expected


def test_a_collapsed_model_scores_exactly_chance():
    relevant = torch.eye(190, dtype=torch.bool)
    for k in (1, 5, 10):
        collapsed = hits_at_k(torch.ones(190, 190), relevant, k).mean().item()
        assert collapsed == pytest.approx(k / 190, rel=1e-12) == chance_at_k(relevant.sum(1), 190, k)


def test_chance_is_what_random_similarities_score():
    torch.manual_seed(0)
    relevant = torch.zeros(4000, 20, dtype=torch.bool)
    relevant[:, :3] = True
    scored = hits_at_k(torch.rand(4000, 20), relevant, 5).mean().item()
    exact = 1 - math.comb(17, 5) / math.comb(20, 5)
    assert chance_at_k(relevant.sum(1), 20, 5) == pytest.approx(exact, rel=1e-12)
    assert scored == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))


def test_large_galleries_do_not_overflow():
    relevant = torch.zeros(1, 200_000, dtype=torch.bool)
    relevant[0, 7] = True
    assert chance_at_k(torch.tensor([1]), 200_000, 10) == pytest.approx(10 / 200_000, rel=1e-9)
    assert hits_at_k(torch.zeros(1, 200_000), relevant, 200_000).item() == 1.0


def test_recall_in_blocks_is_recall_of_the_whole_matrix():
    torch.manual_seed(0)
    queries, gallery = torch.randn(37, 5), torch.randn(23, 5)
    query_of, gallery_of = torch.arange(37) % 10, torch.arange(23) % 10
    relevant = query_of[:, None] == gallery_of[None]
    for k, (value, chance) in recall(queries, gallery, query_of, gallery_of, (1, 5), block=8).items():
        assert value == pytest.approx(hits_at_k(queries @ gallery.T, relevant, k).mean().item(), abs=1e-12)
        exact = [1 - math.comb(23 - r, k) / math.comb(23, k) for r in relevant.sum(1).tolist()]
        assert chance == pytest.approx(sum(exact) / 37, rel=1e-12)


def test_top_hits_is_the_accuracy_of_torchmetrics():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 9), torch.randint(9, (200,))
    for k in (1, 3):
        oracle = MulticlassAccuracy(9, top_k=k, average="micro")(logits, labels).item()
        assert top_hits(logits, labels, k).mean().item() == pytest.approx(oracle, abs=1e-6)
    by_class = MulticlassAccuracy(9, average=None)(logits, labels)
    got = per_class(top_hits(logits, labels), labels, [f"c{i}" for i in range(9)])
    assert [got[f"c{i}"]["value"] for i in range(9)] == pytest.approx(by_class.tolist(), abs=1e-6)
    assert [got[f"c{i}"]["samples"] for i in range(9)] == torch.bincount(labels).tolist()
    assert mean_per_class(top_hits(logits, labels), labels) == pytest.approx(by_class.mean().item(), abs=1e-6)


def test_classes_that_do_not_occur_are_left_out():
    hits, labels = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 2])
    assert per_class(hits, labels, ["a", "b", "c"]) == {
        "a": {"value": 0.5, "samples": 2},
        "c": {"value": 1.0, "samples": 1},
    }
    assert mean_per_class(hits, labels) == 0.75
    assert largest_share(labels) == 2 / 3


def test_wilson_covers_as_often_as_it_says():
    """Exactly, by summing the binomial over the counts whose interval holds the true share."""
    for n, p in [(40, 0.3), (190, 0.63), (190, 0.026)]:
        covered = sum(
            math.comb(n, h) * p**h * (1 - p) ** (n - h)
            for h in range(n + 1)
            if wilson_interval(h / n, n)[0] <= p <= wilson_interval(h / n, n)[1]
        )
        assert 0.92 < covered < 0.98
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


@pytest.mark.parametrize(
    ("similarity", "relevant", "k", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool), 1, "both"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), 1, "right candidate"),
        (torch.full((2, 3), math.nan), torch.ones(2, 3, dtype=torch.bool), 1, "NaN"),
        (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 0, "at least 1"),
    ],
)
def test_wrong_input_is_refused(similarity, relevant, k, message):
    with pytest.raises(ValueError, match=message):
        hits_at_k(similarity, relevant, k)


def test_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match="9 classes"):
        top_hits(torch.zeros(1, 9), torch.tensor([9]))


def test_calibration_and_confusion_are_those_of_torchmetrics():
    draw = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(500, 7, generator=draw) * 3, torch.randint(7, (500,), generator=draw)
    ece = multiclass_calibration_error(logits.double().softmax(1), labels, num_classes=7, n_bins=15, norm="l1")
    assert expected_calibration_error(logits, labels) == pytest.approx(ece.item(), abs=1e-6)
    assert expected_calibration_error(torch.full((2, 2), 0.0), torch.tensor([0, 1])) == 0
    assert torch.equal(answer_counts(logits, labels), multiclass_confusion_matrix(logits, labels, num_classes=7))


def test_mistakes_are_the_commonest_first_and_rows_are_what_is():
    logits = torch.eye(3)[[0, 0, 1, 1, 1, 2, 2]]
    told = answers(logits, torch.tensor([0, 1, 1, 2, 2, 2, 0]), ("ant", "bee", "cat"))
    assert told["confusion"] == {"classes": ["ant", "bee", "cat"], "counts": [[1, 0, 1], [1, 1, 0], [0, 2, 1]]}
    assert told["mistakes"][0] == {"class": "cat", "answer": "bee", "count": 2, "of": 3} and len(told["mistakes"]) == 3
