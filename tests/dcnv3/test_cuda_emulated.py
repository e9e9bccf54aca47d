"""The CUDA kernels' own code, run on the CPU by a warp emulator (emulation/): teams, shared memory, chunks, sums.

What this cannot show: races between warps, speed, and the 16-bit storage types.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import dcnv3
from dcnv3.geometry import make_geometry

HERE = Path(__file__).parent / "emulation"
CSRC = Path(dcnv3.__file__).parent / "csrc"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulator with")
    built = tmp_path_factory.mktemp("emulation") / "kernels.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{CSRC}", f"-I{HERE}", str(HERE / "kernels.cpp")]
    subprocess.run([*command, "-o", str(built)], check=True, timeout=300)
    loaded = ctypes.CDLL(str(built))
    loaded.run.argtypes = [ctypes.c_void_p, ctypes.c_double, ctypes.c_int, ctypes.c_int, ctypes.c_void_p] + [
        ctypes.c_int
    ] * 4
    return loaded


def emulate(library: ctypes.CDLL, call: Any, dtype: torch.dtype, *, wide: bool, fixed: bool) -> dict[str, torch.Tensor]:
    g = make_geometry(**call.options)
    n, height, width, channels = call.value.shape
    tensors = [t.to(dtype).contiguous() for t in (call.value, call.offset, call.mask)]
    output = torch.full_like(call.cotangent, torch.nan, dtype=dtype)
    grads = [torch.full_like(t, torch.nan) for t in tensors]
    sizes = [n, height, width, *call.cotangent.shape[1:3], g.groups, channels // g.groups, *g[1:9]]
    everything = [*tensors, output, call.cotangent.to(dtype).contiguous(), *grads]
    pointers = (ctypes.c_void_p * 8)(*(t.data_ptr() for t in everything))
    for backward in (0, 1):
        arguments = (g.offset_scale, g.remove_center, g.activation, pointers)
        is_double = dtype == torch.float64
        assert library.run((ctypes.c_int64 * 15)(*sizes), *arguments, is_double, wide, backward, fixed) == 0
    names = ("output", "grad_value", "grad_offset", "grad_mask")
    return {name: t.double() for name, t in zip(names, (output, *grads), strict=True)}


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
    library: ctypes.CDLL, make_call: Any, shape: dict[str, Any], wide: bool, dtype: torch.dtype, fixed: bool
) -> None:
    call = make_call(**({"height": 5, "width": 4} | shape), dtype=dtype)
    # the same numbers in float64; locations this far from the integers fall into one cell in both
    shift = call.offset.unflatten(-1, (-1, 2))
    call.offset = torch.where((shift - shift.round()).abs() < 1e-3, shift.round(), shift).flatten(-2)
    expected = call.run("reference", "cpu", torch.float64)
    actual = emulate(library, call, dtype, wide=wide, fixed=fixed)
    for key, want in expected.items():
        tolerance = 1e-12 if dtype == torch.float64 and not (fixed and key == "grad_value") else 4e-6
        scale = max(float(want.abs().max()), 1.0)
        assert float((actual[key] - want).abs().max()) <= tolerance * scale, key


def test_fixed_point_gives_nan_for_a_gradient_that_is_not_finite(library: ctypes.CDLL, make_call: Any) -> None:
    call = make_call(height=4, width=3)
    call.cotangent[0, 0, 0, 0] = torch.inf
    assert bool(emulate(library, call, torch.float32, wide=True, fixed=True)["grad_value"].isnan().all())
