"""The oneDNN Linear is nn.Linear: same parameters, names, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.models.linear import ONEDNN_AVAILABLE, Linear, OneDnnLinear, linear, made_by_intel, use_fast_linears

needs_onednn = pytest.mark.skipif(not ONEDNN_AVAILABLE, reason="oneDNN's products are used on x86 only")


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN's products, also on an Intel, where they are not the default."""
    monkeypatch.setattr("pretrain.models.linear._CHOSEN", True)


@needs_onednn
@pytest.mark.usefixtures("onednn")
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
    assert type(ours.grad_fn).__name__ == f"{OneDnnLinear.__name__}Backward"
    exact = F.linear(*(None if t is None else t.double() for t in (x, weight, b)))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)
    gradients = torch.autograd.grad(ours, wanted, cotangent)
    for gradient, expected in zip(gradients, torch.autograd.grad(exact, wanted, cotangent.double()), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3)


@needs_onednn
@pytest.mark.usefixtures("onednn")
def test_a_transposed_input_and_a_frozen_weight():
    x = torch.randn(64, 96).t().requires_grad_()
    weight = torch.randn(80, 64)
    y = linear(x, weight)
    y.sum().backward()
    torch.testing.assert_close(y, F.linear(x, weight), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(96, 64), rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.usefixtures("onednn")
def test_an_expanded_gradient_is_laid_out_for_the_products(monkeypatch):
    seen = []
    product = torch.ops.mkldnn._linear_pointwise

    def watched(a, b, bias=None):
        seen.extend((*a.stride(), *b.stride()))
        return product(a, b, bias, "none", [], "")

    monkeypatch.setattr("pretrain.models.linear._product", watched)
    x, weight = torch.randn(64, 96, requires_grad=True), torch.randn(80, 96, requires_grad=True)
    linear(x, weight).sum().backward()
    assert seen and 0 not in seen
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(80, 96), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("vendor", "intel"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_an_intel_keeps_mkl(tmp_path, monkeypatch, vendor, intel):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: beside a GenuineIntel\n")
    assert made_by_intel(cpuinfo) is intel
    monkeypatch.setattr("platform.processor", lambda: f"Intel64 Family 6, {vendor}")
    assert made_by_intel(tmp_path / "absent") is intel
    monkeypatch.setattr("pretrain.models.linear._CHOSEN", not intel)
    x, weight = torch.randn(4096, 64, requires_grad=True), torch.randn(256, 64)
    taken = type(linear(x, weight).grad_fn).__name__
    assert (taken == "OneDnnLinearBackward") is (ONEDNN_AVAILABLE and not intel)


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
