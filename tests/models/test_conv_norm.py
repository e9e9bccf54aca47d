"""BatchNorm behind the convolutions of the stem and of the ways down, where `conv_norm` is "batch"."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.models import InternImage, official


def build(conv_norm: str = "batch") -> InternImage:
    return InternImage(16, (1, 1, 1, 1), (1, 2, 4, 8), num_classes=3, conv_norm=conv_norm).double()


def test_the_stem_and_the_ways_down_are_torchs_convolution_and_batchnorm():
    torch.manual_seed(0)
    model = build()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    norms = [nn.BatchNorm2d(width).double() for width in (8, 16, 32)]
    for training in (True, False):
        model.train(training)
        for norm in norms:
            norm.train(training)
        stem, down = model.stem, model.stages[0].downsample
        expected = norms[1](stem.conv2(F.gelu(norms[0](stem.conv1(x)))))
        torch.testing.assert_close(stem(x), expected.permute(0, 2, 3, 1))
        expected = norms[2](down.conv(expected))
        torch.testing.assert_close(down(stem(x) if not training else _same(stem, x)), expected.permute(0, 2, 3, 1))


def _same(stem: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The stem's output in training mode without moving its running statistics once more."""
    kept = {name: value.clone() for name, value in stem.state_dict().items()}
    out: torch.Tensor = stem(x)
    stem.load_state_dict(kept)
    return out


def test_running_statistics_travel_under_official_keys():
    torch.manual_seed(0)
    model = build().train()
    model(torch.randn(4, 3, 64, 64, dtype=torch.float64))
    state = official.state_dict(model)
    assert state["patch_embed.norm1.1.num_batches_tracked"] == 1
    assert state["levels.2.downsample.norm.1.running_var"].shape == (128,)
    other = build()
    official.load_state_dict(other, state)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert build("layer").state_dict().keys() < model.state_dict().keys()
    with pytest.raises(ValueError, match="conv_norm"):
        build("instance")
