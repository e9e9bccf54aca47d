"""The operator on one packed tensor, with and without the centre, against the plain operator and the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dcnv3 import DCNv3, dcnv3
from dcnv3.geometry import Geometry, make_geometry
from dcnv3.operator import packed_dcnv3
from dcnv3.registration import packed_backward, packed_forward

SHAPES: list[dict[str, Any]] = [
    {"groups": 2, "group_channels": 16},
    {"groups": 3, "group_channels": 5, "padding": 6},
    {"groups": 5, "group_channels": 32, "mask_activation": "sigmoid", "padding": 1},
    {"groups": 17, "group_channels": 8, "mask_activation": "none", "padding": 3},
    {"groups": 2, "group_channels": 40, "kernel_size": 5, "remove_center": True, "pad": 2},
]
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def tensors(shape: dict[str, Any], center: bool) -> tuple[Geometry, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Geometry, value, packed and the output's gradient of a 2 x 6 x 7 map, in float64."""
    options = {"padding": shape.get("pad", 1)} | {
        name: shape[name] for name in ("groups", "kernel_size", "mask_activation", "remove_center") if name in shape
    }
    geometry = make_geometry(**options)
    generator = torch.Generator().manual_seed(0)

    def normal(channels: int) -> torch.Tensor:
        return torch.randn(2, 6, 7, channels, generator=generator, dtype=torch.float64)

    channels = shape["groups"] * shape["group_channels"]
    padding = shape.get("padding", 0)
    return geometry, normal(channels), 1.5 * normal(geometry.places(center) + padding), normal(channels)


def by_parts(value: torch.Tensor, packed: torch.Tensor, geometry: Geometry, center: bool) -> torch.Tensor:
    """The definition: three tensors cut by hand, sampled, and mixed."""
    places = geometry.groups * geometry.points
    options = {
        "groups": geometry.groups,
        "kernel_size": (geometry.kernel_h, geometry.kernel_w),
        "padding": (geometry.padding_h, geometry.padding_w),
        "remove_center": geometry.remove_center,
        "mask_activation": ("softmax", "sigmoid", "none")[geometry.activation],
    }
    offset, mask = packed[..., : 2 * places], packed[..., 2 * places : 3 * places]
    sampled = dcnv3(value, offset, mask, **options, backend="reference")
    if not center:
        return sampled
    share = packed[..., 3 * places : 3 * places + geometry.groups].sigmoid()
    share = share.repeat_interleave(value.shape[-1] // geometry.groups, -1)
    return sampled * (1 - share) + value * share


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("center", [False, True], ids=["plain", "centre"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_equals_its_parts(shape: dict[str, Any], center: bool, dtype: torch.dtype, kernel: Any) -> None:
    name, device = kernel
    geometry, *exact = tensors(shape, center)
    low = [t.to(device, dtype) for t in exact]
    leaves = [t.to(device, torch.float64).requires_grad_() for t in low[:2]]
    expected = by_parts(*leaves, geometry, center)
    expected_grads = torch.autograd.grad(expected, leaves, low[2].double())

    leaves = [t.clone().requires_grad_() for t in low[:2]]
    output = packed_dcnv3(*leaves, geometry, center=center, backend=name)
    grads = torch.autograd.grad(output, leaves, low[2])
    fallback = packed_forward(*low[:2], *geometry, center), *packed_backward(low[2], *low[:2], *geometry, center, False)
    for want, *have in zip((expected, *expected_grads), (output, *grads), fallback, strict=True):
        for one in have:
            worst = (one.double() - want).abs().max() / want.abs().max()
            assert worst < BOUNDS[dtype], f"{one.shape}: {worst:.1e}"
    for grad in (grads[1], fallback[2]):
        assert not grad[..., geometry.places(center) :].any()


def test_a_row_of_a_wider_tensor_is_read_in_place(kernel: Any) -> None:
    name, device = kernel
    geometry, *exact = tensors(SHAPES[0], True)
    value, packed, _ = (t.to(device) for t in exact)
    wide = torch.full((*packed.shape[:-1], packed.shape[-1] + 9), float("nan"), device=device, dtype=packed.dtype)
    wide[..., 4:-5] = packed
    want = packed_dcnv3(value, packed, geometry, center=True, backend=name)
    assert torch.equal(packed_dcnv3(value, wide[..., 4:-5], geometry, center=True, backend=name), want)


def test_second_derivatives_are_those_of_the_definition(kernel: Any) -> None:
    name, device = kernel
    geometry = make_geometry(groups=2, kernel_size=2, padding=0, offset_scale=0.5)
    centred = make_geometry(groups=1)
    torch.manual_seed(0)
    for g, center, out in ((geometry, False, 2), (centred, True, 3)):
        leaves = [
            torch.randn(1, 3, 3, 4, dtype=torch.float64, device=device, requires_grad=True),
            torch.randn(1, out, out, g.places(center) + 2, dtype=torch.float64, device=device, requires_grad=True),
        ]

        def call(value: torch.Tensor, packed: torch.Tensor, g: Geometry = g, center: bool = center) -> torch.Tensor:
            return packed_dcnv3(value, packed, g, center=center, backend=name)

        assert torch.autograd.gradcheck(call, leaves, nondet_tol=1e-9)
        assert torch.autograd.gradgradcheck(call, leaves, nondet_tol=1e-9)


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centre"])
def test_torch_func_and_forward_mode_give_the_definition(center: bool, kernel: Any) -> None:
    name, device = kernel
    geometry, *exact = tensors(SHAPES[0], center)
    value, packed, cotangent = (t.to(device) for t in exact)

    def call(value: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        return packed_dcnv3(value, packed, geometry, center=center, backend=name)

    def definition(value: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        return packed_dcnv3(value, packed, geometry, center=center, backend="reference")

    def derivatives(function: Any) -> list[torch.Tensor]:
        def loss(value: torch.Tensor, packed: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
            return (function(value[None], packed[None])[0] * cotangent).sum()

        each = torch.func.vmap(torch.func.grad(loss, (0, 1)))(value, packed, cotangent)
        _, tangent = torch.func.jvp(function, (value, packed), (cotangent, packed.cos()))
        with torch.autograd.forward_ad.dual_level():
            dual = function(value, torch.autograd.forward_ad.make_dual(packed, packed.cos()))
            _, along = torch.autograd.forward_ad.unpack_dual(dual)
        return [*each, tangent, along]

    for have, want in zip(derivatives(call), derivatives(definition), strict=True):
        torch.testing.assert_close(have, want, atol=1e-12, rtol=1e-12)
    assert derivatives(call)[2].abs().max() > 0.1


def test_a_gpus_deterministic_mode_gives_the_same_bits_twice(gpu_kernel: str) -> None:
    geometry, *exact = tensors({"groups": 2, "group_channels": 16, "mask_activation": "none"}, True)
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            leaves = [t.to("cuda", torch.bfloat16).requires_grad_() for t in exact[:2]]
            output = packed_dcnv3(*leaves, geometry, center=True, backend=gpu_kernel)
            runs.append([output, *torch.autograd.grad(output, leaves, exact[2].to(output))])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centre"])
def test_opcheck_passes_for_the_packed_pair(center: bool, device: str) -> None:
    geometry, value, packed, grad = (
        t.to(device, torch.float32) if isinstance(t, torch.Tensor) else t for t in tensors(SHAPES[1], center)
    )
    leaves = value.clone().requires_grad_(), packed.clone().requires_grad_()
    torch.library.opcheck(torch.ops.dcnv3.packed_forward.default, (*leaves, *geometry, center))
    torch.library.opcheck(
        torch.ops.dcnv3.packed_backward.default,
        (grad, value, packed, *geometry, center, False),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_autocast_casts_both_tensors(device: str) -> None:
    geometry, value, packed, _ = (
        t.to(device, torch.float32) if isinstance(t, torch.Tensor) else t for t in tensors(SHAPES[0], True)
    )
    leaves = [value.requires_grad_(), packed.requires_grad_()]
    with torch.autocast(device, torch.bfloat16):
        output = torch.ops.dcnv3.packed_forward(leaves[0], leaves[1].bfloat16(), *geometry, True)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"packed": torch.zeros(2, 6, 7, 55)}, "packed has shape .*2, 6, 7, 55.*, expected at least 56"),
        ({"packed": torch.zeros(6, 7, 56)}, "."),
        ({"packed": torch.zeros(2, 6, 6, 56)}, "offset has shape"),
        ({"packed": torch.zeros(2, 6, 7, 56).double()}, "one dtype"),
        ({"geometry": make_geometry(groups=2, padding=0), "packed": torch.zeros(2, 4, 5, 56)}, "of the value's size"),
        ({"geometry": make_geometry(groups=3), "packed": torch.zeros(2, 6, 7, 99)}, "multiple of groups=3"),
    ],
)
def test_the_raw_packed_operator_refuses_what_does_not_fit(change: dict[str, Any], words: str) -> None:
    call = {"value": torch.zeros(2, 6, 7, 16), "packed": torch.zeros(2, 6, 7, 56), "geometry": make_geometry(groups=2)}
    assert torch.ops.dcnv3.packed_forward(call["value"], call["packed"], *call["geometry"], True).shape == (2, 6, 7, 16)
    call |= change
    with pytest.raises(RuntimeError, match=words):
        torch.ops.dcnv3.packed_forward(call["value"], call["packed"], *call["geometry"], True)
    with pytest.raises(RuntimeError, match=words):
        grad = torch.zeros(2, 6, 7, 16)
        torch.ops.dcnv3.packed_backward(grad, call["value"], call["packed"], *call["geometry"], True, False)


@pytest.mark.parametrize(
    ("groups", "center", "width"), [(4, False, 112), (8, False, 216), (2, True, 56), (3, True, 88)]
)
def test_the_layer_makes_all_places_by_one_product(groups: int, center: bool, width: int) -> None:
    """Of a width that is a multiple of 8, with the numbers of separate products first."""
    seen: list[torch.Size] = []

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        seen.append(weight.shape)
        return F.linear(x, weight, bias)

    torch.manual_seed(0)
    layer = DCNv3(8 * groups, groups, center_feature_scale=center, product=product)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, 6, 8 * groups)
    layer(x).square().sum().backward()
    assert seen == [torch.Size([width, 8 * groups])]

    linears = [layer.offset, layer.mask, *([] if layer.center_scale is None else [layer.center_scale])]
    packed = layer.offset(x, *linears[1:])
    apart = torch.cat([F.linear(x, linear.weight, linear.bias) for linear in linears], -1)
    torch.testing.assert_close(packed[..., : apart.shape[-1]], apart)
    for linear in linears:  # the padding's columns give the weights that they repeat no gradient
        linear.zero_grad()
    cotangent = torch.randn_like(packed)
    (packed * cotangent).sum().backward()
    rows = 0
    for linear in linears:
        own = cotangent[..., rows : rows + linear.out_features].flatten(0, 2)
        assert linear.weight.grad is not None and linear.bias.grad is not None
        torch.testing.assert_close(linear.weight.grad, own.T @ x.flatten(0, 2), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(linear.bias.grad, own.sum(0), atol=1e-4, rtol=1e-4)
        rows += linear.out_features


def test_parameters_are_read_inside_their_own_layers_call() -> None:
    """Who shards or offloads parameters brings them back in a hook of the module that owns them."""
    layer = DCNv3(16, 2, center_feature_scale=True)
    x = torch.randn(1, 5, 6, 16)
    want = layer(x)
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            held = parameter.data

            def fetch(_module: Any, _inputs: Any, parameter: Any = parameter, held: Any = held) -> None:
                parameter.data = held

            def drop(_module: Any, _inputs: Any, _output: Any, parameter: Any = parameter) -> None:
                parameter.data = torch.empty(0)

            assert name in ("weight", "bias")
            parameter.data = torch.empty(0)
            module.register_forward_pre_hook(fetch)
            module.register_forward_hook(drop)
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_map_is_copied_or_laid_out_anew(dtype: torch.dtype, device: str) -> None:
    """Neither for the depthwise convolution's NHWC view nor for the gradient of the places; the weights' are small."""
    layer = DCNv3(32, 2, center_feature_scale=True).to(device, dtype)
    x = torch.randn(2, 6, 7, 32, device=device, dtype=dtype, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        output = layer(x)
        output.backward(torch.ones_like(output))
    events = [event for event in profile.events() if event.name.startswith(("aten::", "dcnv3::"))]
    smallest_map = 2 * 6 * 7 * 32
    copied = [
        (event.name, event.input_shapes)
        for event in events
        if event.name.split("::")[1] in ("copy_", "clone", "contiguous", "_to_copy")
        and not (event.cpu_parent is not None and event.cpu_parent.name == "aten::addmm")  # a bias, into its output
        and max((math.prod(shape) for shape in event.input_shapes if shape), default=0) >= smallest_map
    ]
    names = {event.name for event in events}
    assert "aten::convolution_backward" in names
    assert "dcnv3::norm_backward" in names or {"aten::native_layer_norm_backward", "aten::gelu_backward"} <= names
    assert "dcnv3::packed_backward" in names and "dcnv3::backward" not in names
    assert sum(event.name == "aten::cat" for event in events) == 1  # weights and biases, going forward
    assert not copied or device == "cuda"  # where cuDNN may lay out the convolution's tensors anew
