"""LayerNorm, LayerNorm with GELU, and GELU, against PyTorch's own operators in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dcnv3 import NormGelu, fused, gelu, gelu_, joined_linears, layer_norm, norm_gelu, residual_norm, split_norm

pytestmark = pytest.mark.skipif(not fused.built("norm_forward", "cpu"), reason="the CPU kernels are not built here")

EPS = 1e-6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def composed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return F.gelu(F.layer_norm(x, weight.shape, weight, bias, eps))


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def tensors(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.5) -> list[torch.Tensor]:
    """x, weight, bias and the output's gradient."""
    torch.manual_seed(0)
    made = [2 * torch.randn(shape) + mean, torch.randn(shape[-1]), torch.randn(shape[-1]), torch.randn(shape)]
    return [t.to(dtype) for t in made]


def results(function: Norm, given: list[torch.Tensor], compute: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of x, weight and bias."""
    leaves = [t.detach().to(compute).requires_grad_() for t in given[:3]]
    output = function(*leaves, EPS)
    return [output.detach(), *torch.autograd.grad(output, leaves, given[3].to(compute))]


def assert_near(have: list[torch.Tensor], want: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(have, want, strict=True):
        assert a.shape == b.shape
        assert float((a.double().cpu() - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1.0)


@pytest.mark.parametrize("shape", [(5, 1), (3, 5), (2, 3, 4, 16), (700, 17), (40, 64), (3, 333)], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("function", "oracle"), [(norm_gelu, composed), (layer_norm, plain)], ids=["gelu", "plain"])
def test_a_norm_computes_the_definition(
    function: Norm, oracle: Norm, dtype: torch.dtype, shape: tuple[int, ...], device: str
) -> None:
    given = tensors(shape, dtype)
    have = results(function, [t.to(device) for t in given], dtype)
    assert_near(have, results(oracle, given, torch.float64), TOLERANCE[dtype])


def of_all(norm: Callable[..., tuple[torch.Tensor, ...]], readers: int) -> Norm:
    """A function of all of the outputs, each of which has another gradient."""

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        *normals, same = norm(x, weight, bias, eps, readers)
        assert len(normals) == readers
        return normals[0] + sum(0.75 * normal.sin() for normal in normals[1:]) + 0.5 * same.square()

    return run


def split(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, readers: int
) -> tuple[torch.Tensor, ...]:
    return (*[plain(x, weight, bias, eps)] * readers, x)


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("shape", [(5, 1), (2, 3, 4, 16), (70, 17)], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_split_norm_adds_the_gradients_of_its_readers_and_the_residual(
    dtype: torch.dtype, shape: tuple[int, ...], readers: int, device: str
) -> None:
    given = tensors(shape, dtype)
    want = results(of_all(split, readers), given, torch.float64)
    have = results(of_all(split_norm, readers), [t.to(device) for t in given], dtype)
    assert_near(have, want, 2 * TOLERANCE[dtype])
    for index in range(readers + 1):  # one of the outputs alone

        def one(*arguments: Any, index: int = index) -> torch.Tensor:
            return split_norm(*arguments, readers)[index] * 1

        def wanted(*arguments: Any, index: int = index) -> torch.Tensor:
            return split(*arguments, readers)[index] + 0 * sum(t.sum() for t in arguments[:3])

        x, weight, bias = (t.detach().requires_grad_() for t in given[:3])
        found = torch.autograd.grad(one(x, weight, bias, EPS), (x, weight, bias), given[3])
        assert_near(list(found), results(wanted, given, torch.float64)[1:], 2 * TOLERANCE[dtype])


def ended(*factors: float | None) -> tuple[Norm, Norm]:
    """A branch's end, and the oracle: functions of x alone, whose square is what it is added to."""

    def factor_of(x: torch.Tensor) -> torch.Tensor | None:
        if factors[0] is None:
            return None
        return torch.tensor(factors, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return residual_norm(x, x.square(), factor_of(x), weight, bias, eps)

    def oracle(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        factor = factor_of(x)
        return x.square() + (1.0 if factor is None else factor) * plain(x, weight, bias, eps)

    return run, oracle


@pytest.mark.parametrize("factors", [(None,), (0.0, 1.25, -0.5)], ids=["added", "with factors"])
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 4, 16), (3, 70, 17)], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_residual_norm_ends_a_branch(
    dtype: torch.dtype, shape: tuple[int, ...], factors: tuple[float | None, ...], device: str
) -> None:
    given = tensors(shape, dtype)
    run, oracle = ended(*factors)
    have = results(run, [t.to(device) for t in given], dtype)
    assert_near(have, results(oracle, given, torch.float64), 2 * TOLERANCE[dtype])


def test_a_large_mean_does_not_drown_the_variance() -> None:
    given = tensors((64, 80), torch.float32, mean=3000.0)
    want = results(composed, given, torch.float64)
    assert_near(results(norm_gelu, given, torch.float32), want, 5e-4)  # x itself has 3e-4 / 2 of its deviation


def test_layouts_and_no_rows() -> None:
    x, weight, bias, grad = tensors((6, 4, 24), torch.float32)
    for turned in (lambda t: t.transpose(0, 1), lambda t: t[:, ::2], lambda t: t[:0]):
        given = [turned(x), weight, bias, turned(grad)]
        have = results(norm_gelu, given, torch.float32)
        assert_near(have, results(composed, given, torch.float64), 2e-6) if turned(x).numel() else None
        assert have[0].shape == turned(x).shape
    empty = results(norm_gelu, [x[:0], weight, bias, grad[:0]], torch.float32)
    assert not empty[2].any() and not empty[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gelu_is_as_near_to_float64_as_pytorchs(dtype: torch.dtype) -> None:
    """Relative to 1 + |x|; from far outside to far outside, at a size that is no multiple of a vector."""
    torch.manual_seed(0)
    x = torch.cat([torch.linspace(-12, 12, 200_003), 3 * torch.randn(100_000), torch.logspace(-30, 4, 999)]).to(dtype)
    exact, size = x.double(), 1 + x.double().abs()
    step = torch.ones_like(x)
    pairs = [(gelu(x), F.gelu(x), F.gelu(exact))]
    pairs.append(
        (
            torch.ops.dcnv3.gelu_backward(step, x),
            torch.ops.aten.gelu_backward(step, x),
            torch.ops.aten.gelu_backward(step.double(), exact),
        )
    )
    for ours, aten, want in pairs:
        errors = [float(((have.double() - want).abs() / size).max()) for have in (ours, aten)]
        assert errors[0] <= errors[1] * 1.01
        assert dtype != torch.float32 or errors[0] <= 2e-7
    copy = x.clone()
    assert torch.equal(gelu_(copy), gelu(x)) and torch.equal(copy, gelu(x))


def test_gelu_of_numbers_that_are_not_finite() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e30, -1e30])
    y = gelu(x)
    assert y.isfinite().tolist() == [False, False, False, True, True, True]
    assert y[0].isnan() and y[4] == 1e30 and y[5].abs() < 1e-1


def test_derivatives_of_first_and_second_order() -> None:
    x, weight, bias, _ = (t.double().requires_grad_() for t in tensors((3, 7), torch.float64))
    splits = [of_all(split_norm, readers) for readers in (1, 2)]
    for function in (norm_gelu, layer_norm, *splits, ended(None)[0], ended(0.5, 2.0, 0.0)[0]):

        def run(*given: torch.Tensor, function: Norm = function) -> torch.Tensor:
            return function(*given, EPS)

        assert torch.autograd.gradcheck(run, (x, weight, bias))
        assert torch.autograd.gradgradcheck(run, (x, weight, bias))
    leaf = torch.linspace(-3, 3, 11, requires_grad=True)
    (first,) = torch.autograd.grad(gelu(leaf).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    again = leaf.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(F.gelu(again).sum(), again, create_graph=True)
    torch.testing.assert_close(second.double(), torch.autograd.grad(want.sum(), again)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_pass_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias, grad = tensors((5, 24), dtype)
    _, mean, rstd = torch.ops.dcnv3.norm_forward(x, weight, bias, EPS, True)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.dcnv3.norm_forward.default, (x, weight, bias, EPS, True), test_utils=tests)
    given = (grad, x, weight, bias, mean, rstd, True)
    torch.library.opcheck(torch.ops.dcnv3.norm_backward.default, given, test_utils=tests)
    factor = torch.full((5, 1), 0.5, dtype=dtype)
    for each in (factor, None):
        given = (x, grad, each, weight, bias, EPS)
        torch.library.opcheck(torch.ops.dcnv3.norm_residual.default, given, test_utils=tests)
    given = (grad, factor, x, weight, bias, mean, rstd)
    torch.library.opcheck(torch.ops.dcnv3.norm_backward_scaled.default, given, test_utils=tests)
    for again in (factor.expand_as(grad).contiguous(), None):
        given = (grad, again, grad, x, weight, bias, mean, rstd)
        torch.library.opcheck(torch.ops.dcnv3.norm_backward_split.default, given, test_utils=tests)
    torch.library.opcheck(torch.ops.dcnv3.gelu.default, (x,), test_utils=tests)
    torch.library.opcheck(torch.ops.dcnv3.gelu_.default, (x.clone(),), test_utils=tests[:2])
    torch.library.opcheck(torch.ops.dcnv3.gelu_backward.default, (grad, x), test_utils=tests)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    given = tensors((3001, 40), torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([*results(norm_gelu, given, torch.float32), gelu(given[0])])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("why", ["old extension", "autocast", "mixed dtypes", "torch.func"])
def test_pytorchs_own_operators_serve_where_the_kernels_do_not(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension that was built before these operators were has no kernels for them."""
    x, weight, bias, _ = tensors((5, 24), torch.float32)
    want = composed(x, weight, bias, EPS)
    if why == "old extension":
        monkeypatch.setattr(fused, "built", lambda _name, _device: False)
        assert torch.equal(norm_gelu(x, weight, bias, EPS), want)
        assert torch.equal(gelu(x), F.gelu(x)) and torch.equal(gelu_(x.clone()), F.gelu(x))
    elif why == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(norm_gelu(x, weight, bias, EPS), composed(x, weight, bias, EPS))
    elif why == "mixed dtypes":
        half = x.bfloat16()
        assert torch.equal(norm_gelu(half, weight, bias, EPS), composed(half, weight, bias, EPS))
    else:
        each = torch.func.vmap(norm_gelu, in_dims=(0, None, None, None))(x, weight, bias, EPS)
        torch.testing.assert_close(each, want, atol=1e-6, rtol=1e-5)


def test_a_graph_can_be_had_of_joined_layers_in_every_way() -> None:
    """Values and gradients of one product are those of the layers apart, where one of them needs no gradient too."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, width).double() for width in (4, 3, 1)]
    layers[1].requires_grad_(False)
    x = torch.randn(5, 6, dtype=torch.float64)

    def product(*tensors: torch.Tensor) -> torch.Tensor:
        return F.linear(x, *joined_linears(tensors[:3], tensors[3:]))

    tensors = [layer.weight for layer in layers] + [layer.bias for layer in layers]
    torch.testing.assert_close(product(*tensors), torch.cat([layer(x) for layer in layers], -1))
    assert torch.autograd.gradcheck(product, tensors)
    assert torch.autograd.gradgradcheck(product, tensors)
    (weight, bias) = joined_linears(tensors[:3], tensors[3:])
    assert weight.is_contiguous() and bias.is_contiguous()
    product(*tensors).sum().backward()
    want = x.sum(0).expand(4, 6)
    torch.testing.assert_close(layers[0].weight.grad, want)
    assert layers[1].weight.grad is None
    for wrong in ([torch.zeros(2, 4), torch.zeros(4, 6)], [torch.zeros(2, 4), torch.zeros(4, 4, 1)]):
        with pytest.raises(RuntimeError, match=r"[Ss]izes of tensors|same number of dimensions"):
            joined_linears(wrong, [torch.zeros(2), torch.zeros(4)])
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), product(*tensors))
    each = torch.func.vmap(lambda scale: product(*(scale * tensor for tensor in tensors)))(torch.ones(2).double())
    torch.testing.assert_close(each[1], product(*tensors))
    _, tangent = torch.func.jvp(product, tuple(t.detach() for t in tensors), tuple(t.detach() for t in tensors))
    torch.testing.assert_close(tangent, product(*tensors).detach())


def test_a_compiled_layer_holds_pytorchs_own_operators() -> None:
    layer = NormGelu(24)
    exported = torch.export.export(layer, (torch.randn(5, 24),))
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert targets == {"aten.layer_norm.default", "aten.gelu.default"}
