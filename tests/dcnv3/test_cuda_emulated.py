"""The CUDA kernels' own code, run on the CPU by a warp emulator (emulation/): lane groups, shared memory, chunks, sums.

What this cannot show: races between warps, and speed.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from emulated import TOLERANCE, TYPES, shifted

from dcnv3.geometry import Geometry, make_geometry
from dcnv3.reference import packed_reference


class Places(NamedTuple):
    """What a call is sampled by, or its gradients: slices of one tensor, or tensors of their own."""

    offset: torch.Tensor
    mask: torch.Tensor
    center: torch.Tensor  # without a centre, of no channels
    padding: torch.Tensor


def launch(
    library: ctypes.CDLL,
    geometry: Geometry,
    value: torch.Tensor,
    places: Places,
    results: list[torch.Tensor],
    grad_places: Places,
    *,
    backward: bool,
    fixed: bool,
    tiles: bool,
) -> int:
    """Run a pass. `results`: output, the output's gradient and the value's. Elements that a lane moves, or an error."""
    everything = [value, *places[:3], *results, *grad_places]
    pointers = (ctypes.c_void_p * 11)(*(t.data_ptr() for t in everything))
    sizes = [
        *value.shape[:3],
        *results[0].shape[1:3],
        geometry.groups,
        value.shape[3] // geometry.groups,
        *geometry[1:9],
    ]
    sizes += [t.stride(2) for t in (value, *places[:3], *grad_places[:3])]
    sizes += [places.center.shape[-1] > 0, grad_places.padding.shape[-1]]
    numbers = (geometry.offset_scale, geometry.remove_center, geometry.activation)
    how = (TYPES.index(value.dtype), backward, fixed, tiles)
    return library.run((ctypes.c_int64 * 24)(*sizes), *numbers, pointers, *how)


def emulate(
    library: ctypes.CDLL,
    call: Any,
    dtype: torch.dtype,
    *,
    wide: bool = True,
    fixed: bool = False,
    gap: int = 0,
    tiles: bool = False,
    spread: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """`tiles`: where they apply; `wide`: aligned to 128 bits, else an element off.

    `gap`: between the pixels of what need not be packed.

    `spread`: forward's value, already in `dtype`, its pixels as far from each other as they are there.
    """
    start = 0 if wide else 1
    offset, mask = (shifted(t.to(dtype), start, gap + start) for t in (call.offset, call.mask))
    grads = [torch.full(t.shape, torch.nan, dtype=dtype) for t in (offset, mask)]
    nothing = [offset[..., :0]] * 2
    places, grad_places = Places(offset, mask, *nothing), Places(*grads, *nothing)
    results = _emulate(library, call, places, grad_places, wide, fixed, gap, tiles, spread)
    return results | {"grad_offset": grads[0].double(), "grad_mask": grads[1].double()}


def emulate_packed(
    library: ctypes.CDLL,
    call: Any,
    packed: torch.Tensor,
    center: bool,
    *,
    wide: bool = True,
    fixed: bool = False,
    gap: int = 0,
    tiles: bool = False,
) -> dict[str, torch.Tensor]:
    """The operator on `packed` in its dtype; see `emulate`."""
    geometry = make_geometry(**call.options)
    points, start = geometry.groups * geometry.points, 0 if wide else 1
    parts = [2 * points, points, geometry.groups * center]
    parts += [packed.shape[-1] - sum(parts)]
    places = shifted(packed, start, gap + start)
    grad = torch.full(packed.shape, torch.nan, dtype=packed.dtype)
    cut = (Places(*tensor.split(parts, -1)) for tensor in (places, grad))
    return _emulate(library, call, *cut, wide, fixed, gap, tiles) | {"grad_packed": grad.double()}


def _emulate(
    library: ctypes.CDLL,
    call: Any,
    places: Places,
    grad_places: Places,
    wide: bool,
    fixed: bool,
    gap: int,
    tiles: bool,
    spread: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Both passes: the output and the value's gradient. That of the places is left in `grad_places`."""
    dtype = places.offset.dtype
    output = torch.full_like(call.cotangent, torch.nan, dtype=dtype)
    grad_value = torch.full_like(call.value, torch.nan, dtype=dtype)
    results = [output, call.cotangent.to(dtype).contiguous(), grad_value]
    for backward in (False, True):
        value = shifted(call.value.to(dtype), 0 if wide else 1, 0 if backward else gap)
        if spread is not None and not backward:
            value = spread
        geometry = make_geometry(**call.options)
        passing = {"backward": backward, "fixed": fixed, "tiles": tiles}
        moved = launch(library, geometry, value, places, results, grad_places, **passing)
        assert moved == (16 // dtype.itemsize if wide else 1)
    return {"output": output.double(), "grad_value": grad_value.double()}


def assert_computes(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float, fixed: bool
) -> None:
    for key, want in expected.items():
        scale = max(float(want.abs().max()), 1.0)
        # fixed point is less than float64's own precision
        allowed = max(tolerance, 4e-6) if fixed and key == "grad_value" else tolerance
        assert float((actual[key] - want).abs().max()) <= allowed * scale, key


@pytest.mark.parametrize("fixed", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "wide"),
    [
        ({"group_channels": 16}, True),
        ({"group_channels": 16}, False),
        ({"group_channels": 32, "groups": 3, "stride": (2, 1)}, True),
        ({"group_channels": 4, "groups": 5, "remove_center": True}, True),
        ({"group_channels": 5, "mask_activation": "sigmoid", "dilation": (2, 1), "padding": (2, 0)}, False),
        ({"group_channels": 1, "mask_activation": "none", "logit_amplitude": 3.0}, False),
        ({"group_channels": 8, "kernel": (7, 7), "padding": (3, 3), "height": 4, "width": 3}, True),
        ({"group_channels": 160, "kernel": (2, 3), "padding": (1, 0), "height": 3, "width": 4, "groups": 1}, True),
        ({"group_channels": 40, "kernel": (6, 6), "padding": (3, 3), "height": 3, "width": 2, "groups": 1}, False),
        ({"group_channels": 16, "offset_amplitude": 40.0, "offset_scale": 2.0}, True),
        ({"group_channels": 16, "offset_amplitude": 0.0}, True),
    ],
    ids=str,
)
def test_the_cuda_kernels_compute_the_definition(
    libraries: dict[int, ctypes.CDLL],
    make_call: Any,
    shape: dict[str, Any],
    wide: bool,
    dtype: torch.dtype,
    fixed: bool,
) -> None:
    call = make_call(**({"height": 5, "width": 4} | shape), dtype=dtype)
    # the same numbers in float64; locations this far from the integers fall into one cell in both
    shift = call.offset.unflatten(-1, (-1, 2))
    call.offset = torch.where((shift - shift.round()).abs() < 1e-3, shift.round(), shift).flatten(-2)
    expected = call.run("reference", "cpu", torch.float64)
    by_fours = wide and not fixed and dtype == torch.float32
    for architecture in (800, 900) if by_fours else (800,):
        actual = emulate(libraries[architecture], call, dtype, wide=wide, fixed=fixed)
        assert_computes(actual, expected, TOLERANCE[dtype], fixed)


@pytest.mark.parametrize("fixed", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_cuda_kernels_take_16_bit_types_and_slices(
    libraries: dict[int, ctypes.CDLL], make_call: Any, dtype: torch.dtype, wide: bool, fixed: bool
) -> None:
    call = make_call(height=4, width=3, group_channels=24, groups=2, dtype=dtype)
    shift = call.offset.float().unflatten(-1, (-1, 2))
    call.offset = torch.where((shift - shift.round()).abs() < 1e-3, shift.round(), shift).flatten(-2).to(dtype)
    expected = call.run("reference", "cpu", torch.float64)
    for architecture in (800, 900) if wide and not fixed else (800,):
        actual = emulate(libraries[architecture], call, dtype, wide=wide, fixed=fixed, gap=8)
        assert_computes(actual, expected, TOLERANCE[dtype], fixed)


PACKED: list[tuple[dict[str, Any], int]] = [  # and columns of padding
    ({"group_channels": 16, "height": 9, "width": 11}, 2),
    ({"group_channels": 32, "batch": 1, "height": 6, "width": 9, "offset_amplitude": 12.0}, 4),
    ({"group_channels": 32, "groups": 3}, 5),
    ({"group_channels": 24, "kernel": (7, 7), "padding": (3, 3), "groups": 1, "height": 4}, 0),
    ({"group_channels": 8, "mask_activation": "sigmoid", "dilation": (2, 1), "padding": (2, 1), "groups": 3}, 0),
    ({"group_channels": 40, "mask_activation": "none", "logit_amplitude": 1e-4, "remove_center": True}, 1),
]


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centre"])
@pytest.mark.parametrize("fixed", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("shape", "padding"), PACKED, ids=str)
def test_the_cuda_kernels_compute_the_packed_definition(
    libraries: dict[int, ctypes.CDLL],
    make_call: Any,
    shape: dict[str, Any],
    padding: int,
    dtype: torch.dtype,
    fixed: bool,
    center: bool,
) -> None:
    """Every number of the gradient is written, also the padding's zeros, and in odd rows, where no pair is aligned."""
    call = make_call(**({"height": 5, "width": 4} | shape), dtype=dtype)
    shift = call.offset.double().unflatten(-1, (-1, 2))
    call.offset = torch.where((shift - shift.round()).abs() < 1e-3, shift.round(), shift).flatten(-2).to(dtype)
    geometry = make_geometry(**call.options)
    logits = torch.linspace(-4, 4, call.mask[..., 0].numel() * geometry.groups).view(*call.mask.shape[:3], -1).to(dtype)
    further = torch.full((*call.mask.shape[:3], padding), torch.nan, dtype=dtype)
    packed = torch.cat([call.offset, call.mask, *[logits] * center, further], -1)

    leaves = [t.detach().double().requires_grad_() for t in (call.value, packed)]
    output = packed_reference(*leaves, geometry, center)
    grads = torch.autograd.grad(output, leaves, call.cotangent.double())
    expected = dict(zip(("output", "grad_value", "grad_packed"), (output.detach(), *grads), strict=True))
    for wide, gap, tiles in ((True, 0, True), (True, 8, False), (False, 3, False)):
        for architecture in (800, 900) if wide and not fixed else (800,):
            how = {"wide": wide, "fixed": fixed, "gap": gap, "tiles": tiles}
            actual = emulate_packed(libraries[architecture], call, packed, center, **how)
            assert_computes(actual, expected, TOLERANCE[dtype], fixed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_emulated_16_bit_types_round_as_torch_does(
    libraries: dict[int, ctypes.CDLL], make_call: Any, dtype: torch.dtype
) -> None:
    """A one-point kernel of weight 1.5 at rest, on every number that the type has: widened, multiplied, narrowed."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = torch.where(numbers.isfinite(), numbers, 0)
    call = make_call(
        batch=1, height=64, width=64, groups=1, group_channels=16, kernel=(1, 1), padding=(0, 0), offset_amplitude=0.0
    )
    call.options["mask_activation"] = "none"
    call.value, call.mask[:] = numbers.view(1, 64, 64, 16), 1.5
    actual = emulate(libraries[800], call, dtype)["output"].to(dtype)
    assert torch.equal(actual, (call.value.float() * 1.5).to(dtype))


def test_a_kernel_of_more_points_than_shared_memory_holds_is_refused(libraries: dict[int, ctypes.CDLL]) -> None:
    """By the launcher, before it would fail at the launch: -1, which the binding turns into words."""
    pointers = (ctypes.c_void_p * 11)()
    answers = {}
    for size in (49, 51, 101, 201):
        # no images: nothing is read
        sizes = [0, size, size, 1, 1, 1, 16, size, size, 1, 1, 0, 0, 1, 1, 16, *[2 * size**2, size**2, 0] * 2, 0, 0]
        for backward in (0, 1):
            done = libraries[800].run((ctypes.c_int64 * 24)(*sizes), 1.0, 0, 0, pointers, 1, backward, 0, 0)
            answers[size, backward] = done
    refused = [key for key, done in answers.items() if done == -1]
    assert refused == [(101, 1), (201, 0), (201, 1)]


@pytest.mark.parametrize("height", [3, 5], ids=["past 2^31 elements", "past 2^32 elements"])
@pytest.mark.parametrize("channels", [16, 5], ids=["wide", "narrow"])
def test_pixels_of_an_image_lie_past_32_bits(
    libraries: dict[int, ctypes.CDLL], make_call: Any, tmp_path: Path, height: int, channels: int
) -> None:
    """Slices of the channels of a sparse file: pixels 2^28 - 8 elements apart, of which only these are there."""
    call = make_call(batch=1, height=height, width=4, groups=2, group_channels=channels, dtype=torch.float16)
    apart = 2**28 - 8
    whole = torch.from_file(str(tmp_path / "sparse"), shared=True, size=height * 4 * apart, dtype=torch.float16)
    (tmp_path / "sparse").unlink()  # the mapping stays
    spread = whole.view(1, height, 4, apart)[..., : 2 * channels].copy_(call.value)
    wide = channels == 16
    near, far = (
        emulate(libraries[800], call, torch.float16, wide=wide, spread=value)["output"] for value in (None, spread)
    )
    assert torch.equal(near, far)


@pytest.mark.parametrize("by", [1, 2, 3, 7, 9, 40, 56, 100, 641, 2**16 - 1, 2**16 + 1, 2**30 + 1, 2**31 - 1])
def test_division_by_multiplication_is_exact(libraries: dict[int, ctypes.CDLL], by: int) -> None:
    """Around multiples of the divisor, where an inexact reciprocal fails first, up to the largest number, 2^31 - 1."""
    last = 2**31 - 1
    multiples = torch.cat([torch.arange(1000), last // by - torch.arange(1000), torch.randint(last // by + 1, (1000,))])
    numbers = (multiples[:, None] * by + torch.tensor([-1, 0, 1])).flatten().clamp(0, last)
    quotients = numbers.to(torch.int32)
    libraries[800].divide_all(quotients.data_ptr(), quotients.numel(), by)
    assert torch.equal(quotients.long(), numbers // by)


def test_an_earlier_error_of_cuda_is_told_as_such(libraries: dict[int, ctypes.CDLL]) -> None:
    """700, an illegal address, comes up while a kernel runs; 1, an invalid value, at a launch."""
    message = libraries[800].message
    earlier = b"dcnv3: an earlier operation, not this one, failed with CUDA error"
    assert message(0, 0) == b""
    assert message(700, 1) == earlier + b" 700 (its text); CUDA_LAUNCH_BLOCKING=1 shows which"
    assert message(0, 1) == b"dcnv3: the launch failed with CUDA error 1 (its text)"
    assert message(0, 700).startswith(b"dcnv3: a kernel that was launched earlier failed with CUDA error 700")


def test_fixed_point_gives_nan_for_a_gradient_that_is_not_finite(
    libraries: dict[int, ctypes.CDLL], make_call: Any
) -> None:
    call = make_call(height=4, width=3)
    call.cotangent[0, 0, 0, 0] = torch.inf
    assert bool(emulate(libraries[800], call, torch.float32, fixed=True)["grad_value"].isnan().all())


def error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> float:
    """The largest, relative to the largest entry."""
    return float((actual[name] - expected[name]).abs().max() / expected[name].abs().max())


TILED = [
    {"height": 11, "width": 19},
    {"height": 30, "width": 9, "group_channels": 32, "groups": 1, "batch": 1},
    {"height": 6, "width": 6, "padding": (0, 2)},
    {"height": 14, "width": 14, "offset_amplitude": 12.0, "mask_activation": "sigmoid"},
    {"height": 9, "width": 16, "mask_activation": "none", "offset_scale": 0.5},
    {"height": 12, "width": 8, "offset_amplitude": 0.0},
]


@pytest.mark.parametrize("fixed", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", TILED, ids=str)
def test_sums_of_tiles_are_the_gradient_of_the_value(
    libraries: dict[int, ctypes.CDLL], make_call: Any, shape: dict[str, Any], dtype: torch.dtype, fixed: bool
) -> None:
    """As near to float64 as without tiles: within the rounding of a 16-bit result; in float32, 1e-6 of the largest."""
    call = make_call(**shape, dtype=dtype)
    shift = call.offset.float().unflatten(-1, (-1, 2))
    call.offset = torch.where((shift - shift.round()).abs() < 1e-3, shift.round(), shift).flatten(-2).to(dtype)
    expected = call.run("reference", "cpu", torch.float64)
    for architecture in (800,) if fixed else (800, 900):
        with_tiles, without = (
            emulate(libraries[architecture], call, dtype, fixed=fixed, tiles=tiles) for tiles in (True, False)
        )
        assert_computes(with_tiles, expected, TOLERANCE[dtype], fixed)
        errors = [error(results, expected, "grad_value") for results in (with_tiles, without)]
        assert errors[0] <= (1e-6 if dtype == torch.float32 else errors[1] + torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_reaches_its_own_pixels(
    libraries: dict[int, ctypes.CDLL], make_call: Any, bad: float
) -> None:
    """Those that the points of its pixel touch, and no others of the tile."""
    call = make_call(height=12, width=10, offset_amplitude=1.0, dtype=torch.bfloat16)
    call.cotangent[0, 5, 3, 7] = bad
    geometry = make_geometry(**call.options)
    packed = torch.cat([call.offset, call.mask, call.mask[..., : geometry.groups]], -1)
    library, dtype = libraries[900], torch.bfloat16
    for with_tiles, without in (
        (emulate(library, call, dtype, tiles=tiles)["grad_value"] for tiles in (True, False)),
        (emulate_packed(library, call, packed, True, tiles=tiles)["grad_value"] for tiles in (True, False)),
    ):
        assert not bool(without.isfinite().all())
        assert torch.equal(with_tiles.isfinite(), without.isfinite())
        assert torch.equal(with_tiles.isnan(), without.isnan())
