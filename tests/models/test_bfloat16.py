"""bf16 on the CPU: no further from fp32 than twice what timm's convnext_tiny is, with weights by the same rule."""

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


def test_a_bf16_training_step_is_finite_and_keeps_the_running_statistics_in_fp32(golden_t):
    model = golden_t.build().to(torch.bfloat16).train()
    model(golden_t.image.to(torch.bfloat16)).float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.conv_head.norm.running_mean.dtype == torch.float32
