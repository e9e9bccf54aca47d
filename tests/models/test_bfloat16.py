"""bf16 on the CPU: no further from fp32 than twice what timm's convnext_tiny is, with weights by the same rule."""

import pytest
import timm
import torch
from torch import nn

from pretrain.models import create_model, official


def error(model: nn.Module, image: torch.Tensor) -> float:
    """Largest difference of the logits from fp32's, over the largest logit."""
    with torch.no_grad():
        exact = model.eval()(image)
        rounded = model.to(torch.bfloat16)(image.to(torch.bfloat16)).float()
    return ((rounded - exact).abs().max() / exact.abs().max()).item()


def test_the_tiny_variant_in_bf16_is_within_twice_convnext_tinys_error(fill_rule):
    image = torch.from_numpy(fill_rule.uniform("input", (2, 3, 96, 96)))
    ours = create_model("internimage_t")
    shapes = official.state_dict(ours)
    official.load_state_dict(
        ours, {k: torch.from_numpy(fill_rule.parameter(k, tuple(v.shape))) for k, v in shapes.items()}
    )
    theirs = timm.create_model("convnext_tiny")
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            # the rule's layer scale is called gamma1 and gamma2
            value.copy_(
                torch.from_numpy(fill_rule.parameter(key + "1" if key.endswith("gamma") else key, tuple(value.shape)))
            )
    ours_error, theirs_error = error(ours, image), error(theirs, image)
    assert 0 < ours_error <= 2 * theirs_error, (ours_error, theirs_error)


def test_autocast_keeps_the_features_in_bf16_and_close(golden):
    model = golden.build()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model.forward_stages(golden.image)
    assert {feature.dtype for feature in features} == {torch.bfloat16}
    for index, feature in enumerate(features):
        expected = golden.expected[f"stage{index}"]
        assert (feature.float() - expected).abs().max() <= 0.05 * expected.abs().max()


def test_both_heads_in_bf16_are_close_to_fp32(golden):
    """Fusion, attention pooling and its norm; or projection, BatchNorm and pooling: logits to a twentieth of the
    largest.
    """
    expected = golden.expected["logits"]
    with torch.no_grad():
        cast = golden.build().to(torch.bfloat16)(golden.image.to(torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = golden.build()(golden.image)
    for logits in (cast, mixed):
        assert logits.dtype == torch.bfloat16
        assert 0 < (logits.float() - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("way", ["cast", "autocast"])
def test_a_bf16_training_step_has_the_gradients_of_fp32_and_keeps_the_running_statistics_in_fp32(
    way, golden, cotangent
):
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        rounded = dtype == torch.bfloat16
        model = golden.build().train()
        if rounded and way == "cast":
            model = model.to(dtype)
        image = golden.image.to(next(model.parameters()).dtype)
        with torch.autocast("cpu", dtype, enabled=rounded and way == "autocast"):
            logits = model(image)
        (logits.float() * cotangent(logits.shape)).sum().backward()
        gradients[dtype] = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
        if hasattr(model, "conv_head"):
            assert model.conv_head.norm.running_mean.dtype == torch.float32
    exact, rounded = gradients[torch.float32], gradients[torch.bfloat16]
    for name, gradient in rounded.items():
        assert gradient.isfinite().all(), name
    # a sampling point near a pixel's edge may round across it, where the slope jumps: the heads are compared apart
    for bound, names in ((0.95, list(exact)), (0.99, [name for name in exact if not name.startswith("st")])):
        whole = [torch.cat([part[name].flatten() for name in names]) for part in (exact, rounded)]
        assert torch.nn.functional.cosine_similarity(*whole, dim=0) > bound
