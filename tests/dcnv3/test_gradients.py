"""The kernels against the float64 definition and finite differences, over shapes, types and far offsets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcnv3 import available_backends, dcnv3
from dcnv3.geometry import make_geometry

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
# A kernel in Triton is compiled anew, for a second, in every geometry.
EXAMPLES = 60 if available_backends()["triton"] is not None else 8
NEAR = 1e-3  # to an integer, where the slope of a sample jumps: rounding may put the location on either side


def places(call: Any) -> torch.Tensor:
    """[N, Ho, Wo, G, K, 2] float64, (w, h): locations, but for the whole number that the output pixel adds."""
    g = make_geometry(**call.options)
    shift = call.offset.double().unflatten(-1, (g.groups, g.points, 2))
    cells = torch.tensor(g.cells(), dtype=torch.float64) * torch.tensor([g.dilation_w, g.dilation_h])
    radius = torch.tensor([(g.dilation_w * (g.kernel_w - 1)) >> 1, (g.dilation_h * (g.kernel_h - 1)) >> 1])
    return (cells - radius + shift) * g.offset_scale


def one_sided(call: Any) -> list[torch.Tensor]:
    """The definition's grad_offset with each location a little lower, and with each a little higher.

    One axis moves at a time: along its own axis a sample's slope is constant up to the next integer, along the other it
    is continuous.
    """
    step = 2 * NEAR / call.options.get("offset_scale", 1.0)
    sides = []
    for direction in (-step, step):
        moved = []
        for axis in (0, 1):
            shift = call.offset.double().unflatten(-1, (-1, 2)).clone()
            shift[..., axis] += direction
            run = replace(call, offset=shift.flatten(-2)).run("reference", "cpu", torch.float64)
            moved.append(run["grad_offset"].unflatten(-1, (-1, 2))[..., axis])
        sides.append(torch.stack(moved, -1).flatten(-2))
    return sides


def assert_agrees(call: Any, name: str, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Relative to the largest entry of each tensor.

    An offset gradient near an integer may be that of either side; exactly on one, where no rounding can have moved it,
    it is that of the cell whose floor it is.
    """
    actual, expected = call.run(name, device, dtype), call.run("reference", "cpu", torch.float64)
    place = places(call)
    distance = (place - place.round()).abs()
    either = ((distance < NEAR) & (distance > 0)).flatten(3)
    for key, want in expected.items():
        have = actual[key]
        assert torch.isfinite(have).all(), key
        scale = max(float(want.abs().max()), 1.0) if want.numel() else 1.0
        difference = (have - want).abs()
        if key == "grad_offset" and bool(either.any()):
            low, high = ((have - side).abs() for side in one_sided(call))
            difference = torch.where(either, torch.minimum(low, high), difference)
        assert difference.numel() == 0 or float(difference.max()) <= tolerance * scale, key


def test_an_offset_gradient_near_an_integer_must_be_that_of_a_side(make_call: Any) -> None:
    """The comparison itself: near an integer each side passes and their mean does not, on it only the floor's."""
    call = make_call(group_channels=4, offset_amplitude=0.0, dtype=torch.float64)
    low, high = one_sided(call)
    floor = call.run("reference")["grad_offset"]  # of the cell above, but 0 at -1, where a location is still outside
    answers = {"low": low, "floor": floor, "high": high, "mean": (low + high) / 2}
    for nudge, passing in ((0.0, {"floor"}), (1e-9, {"low", "floor", "high"})):
        call.offset[:] = nudge
        for side, gradient in answers.items():
            answer = replace(call)
            truth = call.run("reference") | {"grad_offset": gradient}
            answer.run = lambda name, *rest, truth=truth, call=call: truth if name == "cpu" else call.run(name, *rest)
            try:
                assert_agrees(answer, "cpu", "cpu", torch.float64, 1e-6)
            except AssertionError:
                assert side not in passing, (nudge, side)
            else:
                assert side in passing, (nudge, side)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    square = draw(st.booleans())
    kernel_h = draw(st.integers(1, 5))
    kernel = (kernel_h, kernel_h if square else draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    return {
        "batch": draw(st.integers(0, 3)),
        "height": least[0] + draw(st.integers(0, 5)),
        "width": least[1] + draw(st.integers(0, 5)),
        "groups": draw(st.integers(1, 5)),
        "group_channels": draw(st.sampled_from([1, 3, 4, 8, 12, 16, 17, 24, 32, 40, 64, 72])),
        "kernel": kernel,
        "stride": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "padding": padding,
        "dilation": dilation,
        "offset_scale": draw(st.sampled_from([1.0, 2.0, 0.7])),
        "remove_center": draw(st.booleans()) and kernel[0] == kernel[1] and kernel[0] % 2 == 1 and kernel[0] > 1,
        "mask_activation": draw(st.sampled_from(["softmax", "sigmoid", "none"])),
        "offset_amplitude": draw(st.sampled_from([0.0, 0.5, 3.0, 50.0, 1e6])),
        "logit_amplitude": draw(st.sampled_from([0.0, 1.0, 30.0])),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shape=shapes(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_any_shape_equals_the_float64_definition(
    kernel: tuple[str, str], make_call: Any, shape: dict[str, Any], dtype: torch.dtype
) -> None:
    assert_agrees(make_call(**shape, dtype=dtype), *kernel, dtype, TOLERANCE[dtype] * 5)


@pytest.mark.parametrize("group_channels", [5, 8, 16, 32, 64, 80])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_type_and_channel_count_equals_the_float64_definition(
    kernel: tuple[str, str], make_call: Any, dtype: torch.dtype, group_channels: int
) -> None:
    call = make_call(group_channels=group_channels, dtype=dtype)
    assert_agrees(call, *kernel, dtype, TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("remove_center", [False, True])
def test_gradients_are_those_of_finite_differences(
    backend: tuple[str, str], make_call: Any, activation: str, remove_center: bool
) -> None:
    name, device = backend
    call = make_call(
        batch=1,
        height=4,
        width=3,
        group_channels=3,
        remove_center=remove_center,
        offset_scale=1.5,
        mask_activation=activation,
        dtype=torch.float64,
    )
    # finite differences need locations away from the integers, where the slope jumps
    shift = call.offset.unflatten(-1, (-1, 2))
    place = places(call)
    shift = torch.where(((place - place.round()).abs() < NEAR).flatten(3, 4), shift + 0.01, shift)
    leaves = [t.to(device).requires_grad_() for t in (call.value, shift.flatten(-2), call.mask)]
    assert torch.autograd.gradcheck(lambda *t: dcnv3(*t, **call.options, backend=name), leaves, nondet_tol=1e-9)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_second_derivatives_are_those_of_finite_differences(
    backend: tuple[str, str], make_call: Any, activation: str
) -> None:
    name, device = backend
    call = make_call(batch=1, height=3, width=3, groups=1, group_channels=2, dtype=torch.float64, offset_amplitude=0.3)
    call.options["mask_activation"] = activation
    leaves = [t.to(device).requires_grad_() for t in (call.value, call.offset + 0.35, call.mask)]
    assert torch.autograd.gradgradcheck(lambda *t: dcnv3(*t, **call.options, backend=name), leaves, nondet_tol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_second_and_third_derivatives_of_a_kernel_are_those_of_the_definition(
    kernel: tuple[str, str], make_call: Any, dtype: torch.dtype
) -> None:
    """Value, offset and mask come from one tensor, as in a layer: each path must count once."""
    name, device = kernel
    call = make_call(batch=1, height=3, width=4, groups=1, group_channels=4, dtype=dtype, offset_amplitude=0.3)
    x = call.value.to(device).requires_grad_()
    shift, logits = call.offset.to(device) + 0.35, call.mask.to(device)
    runs = []
    for backend in (name, "reference"):
        offset, mask = shift + 0.02 * x.sin().sum(-1, keepdim=True), logits * x.mean(-1, keepdim=True)
        output = dcnv3(x, offset, mask, **call.options, backend=backend)
        derivatives = []
        for _ in range(3):
            output = torch.autograd.grad(output.square().sum(), x, create_graph=True)[0]
            derivatives.append(output.detach())
        runs.append(derivatives)
    for order, (have, want) in enumerate(zip(*runs, strict=True), 1):
        assert float(want.abs().max()) > 0
        tolerance = 1e-9 if dtype == torch.float64 else 0.1 * order
        assert float((have - want).abs().max() / want.abs().max()) < tolerance, order


def test_at_an_integer_location_the_slope_is_that_of_the_cell_above(backend: tuple[str, str]) -> None:
    """One row 0 1 4 9, a one-point kernel at rest on pixel 1: the slope is 4 - 1, not 1 - 0 nor their mean."""
    name, device = backend
    value = torch.tensor([0.0, 1.0, 4.0, 9.0], device=device).reshape(1, 1, 4, 1)
    offset = torch.zeros(1, 1, 4, 2, device=device, requires_grad=True)
    mask = torch.zeros(1, 1, 4, 1, device=device)
    dcnv3(value, offset, mask, groups=1, kernel_size=1, padding=0, backend=name).sum().backward()
    assert offset.grad is not None
    # the last pixel's cell reaches past the edge, where the image is 0
    assert offset.grad[0, 0, :, 0].tolist() == [1.0, 3.0, 5.0, -9.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_location_that_is_no_number_samples_nothing(backend: tuple[str, str], make_call: Any, bad: float) -> None:
    name, device = backend
    call = make_call(group_channels=8)
    call.offset[:] = bad
    actual = call.run(name, device)
    assert all(bool((actual[key] == 0).all()) for key in actual)


def test_extreme_logits_stay_finite(backend: tuple[str, str], make_call: Any) -> None:
    call = make_call(logit_amplitude=1e4)
    assert all(bool(torch.isfinite(t).all()) for t in call.run(*backend).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpu_gives_the_same_bits_twice_and_for_any_number_of_threads(make_call: Any, dtype: torch.dtype) -> None:
    call = make_call(batch=3, height=20, width=21, groups=3, dtype=dtype)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            runs.append(call.run("cpu"))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(run[key], runs[0][key]) for key in run)


def test_views_and_transposes_give_what_copies_give(kernel: tuple[str, str], make_call: Any) -> None:
    """The projections come as slices of one tensor, and a caller may hold NCHW."""
    name, device = kernel
    call = make_call(group_channels=16)
    both = torch.cat([torch.zeros_like(call.mask[..., :3]), call.offset, call.mask], -1).to(device)
    offset, mask = both[..., 3 : 3 + call.offset.shape[-1]], both[..., 3 + call.offset.shape[-1] :]
    value = call.value.to(device).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not value.is_contiguous() and not offset.is_contiguous()
    leaves = [t.detach().requires_grad_() for t in (value, offset, mask)]
    output = dcnv3(*leaves, **call.options, backend=name)
    output.backward(call.cotangent.to(device).transpose(1, 2).contiguous().transpose(1, 2))
    expected = call.run(name, device)
    nearly = 0 if device == "cpu" else 1e-5  # a GPU adds up the value's gradient in any order
    for key, tensor in zip(expected, (output, *(leaf.grad for leaf in leaves)), strict=True):
        torch.testing.assert_close(tensor.detach().double().cpu(), expected[key], atol=nearly, rtol=nearly)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_pixels_lie_past_2_to_the_31_elements(tmp_path: Path, make_call: Any, dtype: torch.dtype) -> None:
    """Slices of the channels of a sparse file: 12 pixels 2^28 elements apart, of which only these bytes are there."""
    if available_backends()["cpu"] is not None:
        pytest.skip("the CPU kernels are not built here")
    call = make_call(batch=2, height=3, width=2, groups=2, group_channels=8, dtype=dtype)
    parts = {name: getattr(call, name) for name in ("value", "offset", "mask")}
    whole = torch.from_file(str(tmp_path / "sparse"), shared=True, size=12 << 28, dtype=dtype).view(2, 3, 2, 1 << 28)
    (tmp_path / "sparse").unlink()  # the mapping stays
    leaves, start = [], 1 << 20
    for part in parts.values():
        leaf = whole[..., start : start + part.shape[-1]]
        leaves.append(leaf.copy_(part).detach().requires_grad_())
        start += 1 << 20
    assert leaves[0].stride(0) * 2 > 2**31
    output = dcnv3(*leaves, **call.options, backend="cpu")
    output.backward(call.cotangent)
    expected = call.run("cpu")
    for key, tensor in zip(expected, (output, *(leaf.grad for leaf in leaves)), strict=True):
        assert torch.equal(tensor.detach().double(), expected[key]), key


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_deterministic_mode_of_a_gpu_gives_the_same_bits_twice(
    gpu_kernel: str, make_call: Any, dtype: torch.dtype
) -> None:
    call = make_call(batch=4, height=30, width=31, groups=4, dtype=dtype, offset_amplitude=20.0)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = call.run(gpu_kernel, "cuda"), call.run(gpu_kernel, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[key], second[key]) for key in first)
    expected = call.run("reference", "cpu", torch.float64)["grad_value"]
    worst = float((first["grad_value"] - expected).abs().max() / expected.abs().max())
    assert worst <= TOLERANCE[dtype] * 5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here")
def test_any_device_index_works(gpu_kernel: str, make_call: Any) -> None:
    call = make_call()
    last = f"cuda:{torch.cuda.device_count() - 1}"
    expected = call.run("reference", "cpu", torch.float64)
    for key, tensor in call.run(gpu_kernel, last).items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("height, width", [(1, 1), (5, 1), (1, 5)])
def test_strides_of_dimensions_of_one_are_not_believed(kernel: tuple[str, str], height: int, width: int) -> None:
    """A contiguous tensor may have any stride there, as NCHW seen as NHWC has."""
    name, device = kernel
    torch.manual_seed(0)
    plain = torch.randn(3, height, width, 16), torch.randn(3, height, width, 36), torch.randn(3, height, width, 18)
    wide = [torch.cat([t, t], 2).to(device)[:, :, :width] for t in plain]  # for width 1: another stride of dimension 2
    nchw = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).to(device) for t in plain]
    runs = []
    for tensors in ([t.to(device) for t in plain], wide, nchw):
        leaves = [t.detach().requires_grad_() for t in tensors]
        output = dcnv3(*leaves, groups=2, backend=name)
        output.square().sum().backward()
        runs.append([output, *(leaf.grad for leaf in leaves)])
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            torch.testing.assert_close(found, expected)
