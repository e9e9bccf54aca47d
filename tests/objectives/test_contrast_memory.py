"""Contrast without the whole: sigmoid loss rank by rank, encoders chunk by chunk; equal to the joined batch."""

import pytest
import torch
from objective_samples import make_batch, make_task

from pretrain.objectives.chunks import in_chunks
from pretrain.objectives.keys import StepKeys
from pretrain.objectives.sigmoid import Exchange, Texts, sigmoid_loss
from pretrain.tasks.pretraining.recipes import RECIPES


def kept_bytes(compute) -> int:
    """Bytes that autograd keeps for the backward pass of what `compute` returns, each storage once."""
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = compute()
    del result
    return sum(storages.values())


def test_the_sigmoid_loss_of_256_ranks_is_the_joined_batchs_and_keeps_two_vectors_a_row():
    ranks, n, dim = 256, 4, 16
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return x / x.norm(dim=-1, keepdim=True)

    images, texts = unit(ranks, n, dim), unit(ranks, n, dim)
    hashes = torch.randint(0, 900, (ranks, n), generator=generator)  # with equal captions among them
    valid = torch.ones(ranks, n, dtype=torch.bool)
    scale, bias = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (8.0, -4.0))
    own, seen = 3, []
    returned: dict[int, torch.Tensor] = {}

    def fetch(source: int) -> Texts:
        seen.append(source)
        return Texts(texts[source], hashes[source], valid[source])

    def give_back(source: int, gradient: torch.Tensor) -> torch.Tensor:
        returned[source] = gradient
        return gradient

    mine, words = images[own].clone().requires_grad_(), texts[own].clone().requires_grad_()
    exchange = Exchange(ranks, own, fetch, give_back)

    def share() -> torch.Tensor:
        return sigmoid_loss(mine, Texts(words, hashes[own], valid[own]), scale, bias, exchange)

    share().backward()
    assert seen == list(range(ranks))
    every_image, every_text = (x.flatten(0, 1).clone().requires_grad_() for x in (images, texts))
    logits = scale.detach() * every_image[own * n : own * n + n] @ every_text.T + bias.detach()
    ids = torch.arange(ranks * n)
    positive = ids[own * n : own * n + n, None] == ids[None]
    same = hashes.flatten()[own * n : own * n + n, None] == hashes.flatten()[None]
    values = torch.log1p(torch.exp(torch.where(positive, -logits, logits)))
    joined = torch.where(positive | ~same, values, 0).sum() / n  # its mean over the ranks is the joined loss
    joined.backward()
    torch.testing.assert_close(share(), joined, rtol=1e-12, atol=0)
    torch.testing.assert_close(mine.grad, every_image.grad[own * n : own * n + n], rtol=1e-9, atol=1e-15)
    found = torch.stack([returned[r] for r in range(ranks)]) / n
    torch.testing.assert_close(found.flatten(0, 1), every_text.grad, rtol=1e-9, atol=1e-15)
    # Images' and texts' gradients and two numbers, whatever the number of ranks.
    assert kept_bytes(share) == 8 * (2 * n * dim + 2)


def test_chunks_give_the_gradient_of_the_whole_and_keep_one_chunks_activations():
    layers = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(6))).double()
    x = torch.randn(64, 32, dtype=torch.float64)

    def loss(rows: int | None) -> torch.Tensor:
        z = torch.nn.functional.normalize(in_chunks(lambda part: layers(part).tanh(), rows, x))
        return torch.logsumexp(z @ z.T, 1).mean()  # every row with every row

    gradients = [torch.autograd.grad(loss(rows), list(layers.parameters())) for rows in (None, 8)]
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("preset", ["m3i", "clip", "siglip", "simclr", "byol"])
def test_a_preset_in_chunks_is_itself_to_rounding_and_keeps_less(preset):
    batch, keys = make_batch(12), StepKeys(1, 2)
    found, kept = {}, {}
    for rows in (None, 3):
        task = make_task(preset, encode_rows=rows).train()
        teacher = task.teacher()
        targets = task.teacher_targets(teacher, batch, keys) if teacher is not None else None
        task(batch, keys, targets).total.backward()
        found[rows] = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
        kept[rows] = kept_bytes(lambda task=task, targets=targets: task(batch, keys, targets).total)
    largest = max(float(g.abs().max()) for g in found[None].values())
    for name, gradient in found[None].items():
        # Drop path of a recomputed chunk draws what it drew before. The pool's softmax is fp32.
        torch.testing.assert_close(found[3][name], gradient, rtol=0, atol=1e-9 * largest, msg=name)
    assert kept[3] < (0.5 if RECIPES[preset].dense else 0.3) * kept[None], kept
