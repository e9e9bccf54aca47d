"""What a model starts from."""

import pytest
import torch

from pretrain.models import InternImage


def linears(**options):
    """name -> (weight, width of its input) of the Linears outside DCNv3, which sets its own."""
    torch.manual_seed(0)
    model = InternImage(
        32, (1, 1, 2, 1), (2, 4, 8, 16), use_clip_projector=True, clip_embed_dim=192, clip_heads=4, **options
    )
    ours = ("mlp.", "clip_projector.proj", "clip_projector.q_", "clip_projector.k_", "clip_projector.v_", "head.")
    named = ((name, p.detach()) for name, p in model.named_parameters() if any(part in name for part in ours))
    weights = {name: weight for name, weight in named if weight.ndim == 2}
    assert len(weights) == 15
    return weights


@pytest.mark.parametrize("options", [{}, {"init_std": 0.05}, {"init_std": None}])
def test_linears_have_the_given_spread_or_that_of_their_width(options):
    for name, weight in linears(**options).items():
        wanted = options.get("init_std", 0.02) or weight.shape[1] ** -0.5
        # Cut at +-2, not at two standard deviations, the spread is the one asked for.
        assert abs(float(weight.std()) / wanted - 1) < 0.06, name
        assert abs(float(weight.mean())) < 0.1 * wanted, name
