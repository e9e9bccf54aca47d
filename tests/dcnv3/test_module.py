"""The layer: its parts by hand, its initial values, its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dcnv3 import DCNv3


def scrambled(**options: Any) -> DCNv3:
    torch.manual_seed(0)
    layer = DCNv3(16, 2, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def test_starts_as_an_average_over_the_kernel() -> None:
    """All offsets 0 and all logits 0: a mean over 3 by 3, of zeros outside, between the two projections."""
    layer = DCNv3(16, 2)
    x = torch.randn(2, 6, 7, 16)
    projected = F.linear(x, layer.input_proj.weight).permute(0, 3, 1, 2)
    mean = F.avg_pool2d(projected, 3, stride=1, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), F.linear(mean, layer.output_proj.weight), atol=1e-5, rtol=1e-5)


def test_initial_values_are_those_of_internimage() -> None:
    layer = DCNv3(16, 2, center_feature_scale=True)
    zero = [layer.offset, layer.mask, layer.center_scale]
    assert all(bool((p == 0).all()) for m in zero if m is not None for p in m.parameters())
    assert bool((layer.input_proj.bias == 0).all()) and bool((layer.output_proj.bias == 0).all())
    bound = (6 / 32) ** 0.5
    for weight in (layer.input_proj.weight, layer.output_proj.weight):
        assert 0.8 * bound < float(weight.detach().abs().max()) <= bound
    assert layer.norm.eps == 1e-6
    assert {name.split(".")[0] for name in layer.state_dict()} == {
        "input_proj",
        "depthwise",
        "norm",
        "offset",
        "mask",
        "center_scale",
        "output_proj",
    }


def test_the_centre_scale_mixes_the_projected_input_back_in() -> None:
    layer = scrambled(center_feature_scale=True)
    assert layer.center_scale is not None
    x = torch.randn(2, 6, 7, 16)
    torch.nn.init.zeros_(layer.center_scale.weight)
    torch.nn.init.eye_(layer.output_proj.weight)
    torch.nn.init.zeros_(layer.output_proj.bias)
    with torch.no_grad():
        layer.center_scale.bias.fill_(-50)
        sampled = layer(x)
        layer.center_scale.bias[0] = 50  # group 0 takes the input alone, group 1 the samples alone
        mixed = layer(x)
        layer.center_scale.bias[0] = 0  # and half of each
        half = layer(x)
        projected = layer.input_proj(x)
    torch.testing.assert_close(mixed, torch.cat([projected[..., :8], sampled[..., 8:]], -1))
    torch.testing.assert_close(half[..., :8], (projected + sampled)[..., :8] / 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 0},
        {"padding": 2},
        {"stride": 2},
        {"kernel_size": 2, "padding": 0},
        {"kernel_size": 5, "padding": 2, "remove_center": True},
        {"dilation": 2, "padding": 2, "offset_scale": 2.0},
        {"mask_activation": "sigmoid"},
        {"mask_activation": "none", "offset_scale": 0.5},
        {"center_feature_scale": True},
    ],
    ids=str,
)
def test_unshared_weights_that_are_all_alike_are_shared_weights(options: dict[str, Any]) -> None:
    shared = scrambled(**options)
    apart = DCNv3(16, 2, share_weights=False, **options)
    weights = shared.state_dict()
    weights["output_proj.weight"] = weights["output_proj.weight"].repeat(1, shared.geometry.points)
    apart.load_state_dict(weights)
    x = torch.randn(2, 7, 6, 16)
    torch.testing.assert_close(apart(x), shared(x), atol=2e-5, rtol=1e-4)


def test_unshared_weights_tell_the_points_apart() -> None:
    """With a weight on one point only, the output is that point's sample: here the pixel up and to the left."""
    layer = DCNv3(16, 2, share_weights=False, mask_activation="none")
    with torch.no_grad():
        layer.mask.bias[:] = 1  # every point counts fully
        layer.input_proj.weight.copy_(torch.eye(16))
        layer.output_proj.weight.zero_()
        layer.output_proj.weight[:, :16] = torch.eye(16)
    x = torch.randn(1, 5, 6, 16)
    expected = F.pad(x, (0, 0, 1, 0, 1, 0))[:, :5, :6]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dw_kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_depthwise_kernel_does_not_change_the_output_size(dw_kernel_size: int, stride: int) -> None:
    layer = DCNv3(16, 2, dw_kernel_size=dw_kernel_size, stride=stride)
    assert layer(torch.randn(1, 8, 9, 16)).shape == (1, (8 - 1) // stride + 1, (9 - 1) // stride + 1, 16)


def test_every_parameter_gets_a_gradient_and_repeats_bit_for_bit() -> None:
    layer = scrambled(center_feature_scale=True)
    runs = []
    for _ in range(2):
        layer.zero_grad()
        layer(torch.ones(2, 6, 7, 16).cumsum(2)).square().sum().backward()
        runs.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    assert len(runs[0]) == len(list(layer.parameters()))
    assert all(bool(g.abs().sum() > 0) for g in runs[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
