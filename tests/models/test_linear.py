"""The oneDNN Linear is nn.Linear: same parameters, names, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.models.linear import _AVAILABLE, Linear, _OneDnnLinear, linear, use_fast_linears


@pytest.mark.skipif(not _AVAILABLE, reason="oneDNN's products are used on x86 only")
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 96), (96, 48), (64, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(128,), (4, 8, 8)])
def test_outputs_and_gradients_are_f_linears(inputs, outputs, bias, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, inputs, generator=generator, requires_grad=True)
    weight = torch.randn(outputs, inputs, generator=generator, requires_grad=True)
    b = torch.randn(outputs, generator=generator, requires_grad=True) if bias else None
    cotangent = torch.randn(*shape, outputs, generator=generator)
    wanted = [t for t in (x, weight, b) if t is not None]
    ours = linear(x, weight, b)
    assert type(ours.grad_fn).__name__ == f"{_OneDnnLinear.__name__}Backward"
    exact = F.linear(*(None if t is None else t.double() for t in (x, weight, b)))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)
    gradients = torch.autograd.grad(ours, wanted, cotangent)
    for gradient, expected in zip(gradients, torch.autograd.grad(exact, wanted, cotangent.double()), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3)


def test_a_transposed_input_and_a_frozen_weight():
    x = torch.randn(64, 96).t().requires_grad_()
    weight = torch.randn(80, 64)
    y = linear(x, weight)
    y.sum().backward()
    torch.testing.assert_close(y, F.linear(x, weight), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(96, 64), rtol=1e-4, atol=1e-4)


def test_other_dtypes_and_autocast_take_the_usual_path():
    layer = Linear(64, 64)
    x = torch.randn(512, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64


def test_replacing_keeps_parameters_names_and_sharing():
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2, bias=False), nn.LayerNorm(2)))
    before = dict(module.named_parameters())
    use_fast_linears(module)
    assert isinstance(module[0], Linear) and isinstance(module[1][0], Linear)
    after = dict(module.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
