"""What a model starts from."""

import pytest
import torch

from pretrain.models import InternImage


def build(**options):
    torch.manual_seed(0)
    pooled = {"use_clip_projector": True, "clip_embed_dim": 192, "clip_heads": 4}
    return InternImage(32, (1, 1, 2, 1), (2, 4, 8, 16), **pooled, **options)


def linears(**options):
    """name -> weight of the Linears that `init_std` is for."""
    model = build(**options)
    ours = ("mlp.", "clip_projector.proj", "clip_projector.q_", "clip_projector.k_", "clip_projector.v_", "head.")
    named = ((name, p.detach()) for name, p in model.named_parameters() if any(part in name for part in ours))
    weights = {name: weight for name, weight in named if weight.ndim == 2}
    assert len(weights) == 15
    return weights


@pytest.mark.parametrize(("options", "std"), [({}, 0.02), ({"init_std": 0.05}, 0.05), ({"init_std": None}, None)])
def test_linears_have_the_given_spread_or_that_of_their_width(options, std):
    for name, weight in linears(**options).items():
        wanted = std if std is not None else weight.shape[1] ** -0.5
        # Cut at +-2, not at two standard deviations, the spread is the one asked for.
        assert abs(float(weight.std()) / wanted - 1) < 0.06, name
        assert abs(float(weight.mean())) < 0.1 * wanted, name


@pytest.mark.parametrize(("std", "wanted"), [(0.02, 0.02), (None, 768**-0.5)])
def test_a_new_classifier_starts_as_the_first_did(std, wanted):
    model = build(init_std=std)
    model.reset_classifier(50)
    assert abs(float(model.head.weight.detach().std()) / wanted - 1) < 0.06


@pytest.mark.parametrize("std", [0, -0.02, float("nan")])
def test_a_spread_that_is_none_is_refused(std):
    with pytest.raises(ValueError, match="init_std"):
        build(init_std=std)
