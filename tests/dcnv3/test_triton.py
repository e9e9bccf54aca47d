"""The Triton kernels: by Triton's interpreter on a CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
SMALL = {"batch": 1, "height": 3, "width": 4}
CASES = [
    SMALL | {"dtype": "float64", "groups": 3, "group_channels": 5, "mask_activation": "sigmoid", "stride": [2, 1]},
    SMALL | {"dtype": "float64", "remove_center": True, "offset_scale": 0.7, "offset_amplitude": 40.0},
    SMALL
    | {"dtype": "float32", "kernel": [2, 3], "padding": [2, 0], "dilation": [1, 2], "height": 5, "width": 6}
    | {"mask_activation": "none", "group_channels": 1},
    SMALL | {"dtype": "bfloat16", "group_channels": 24, "groups": 1},
    SMALL | {"dtype": "float16", "group_channels": 8, "offset_amplitude": 0.0},
    SMALL | {"dtype": "float32", "group_channels": 4, "batch": 0},
    {"dtype": "float32", "group_channels": 2, "groups": 1, "batch": 5, "height": 6, "width": 5},  # two blocks of pixels
]
TOLERANCE = {"float64": 1e-12, "float32": 4e-6, "bfloat16": 1e-2, "float16": 1.5e-3}


def test_the_interpreted_kernels_give_the_golden_numbers_and_the_definition() -> None:
    command = [sys.executable, str(HERE / "triton_interpreted.py"), json.dumps(CASES)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    packed = [row for row in rows if row["case"].startswith("packed")]
    assert len(rows) == 5 + len(CASES) + len(packed)
    assert len(packed) == 2 * len(CASES) - 2  # two have no output of the value's size, and so no centre
    for row in rows:
        dtype = re.search("|".join(TOLERANCE), row["case"])
        tolerance = 1e-5 if row["case"].startswith("op_") else TOLERANCE[dtype[0] if dtype else ""]
        assert len(row["errors"]) == 4 - (row in packed) and max(row["errors"]) <= tolerance, row


@pytest.mark.parametrize(
    ("position", "replacement"),
    [
        (0, torch.zeros(2, 6, 7, 15)),
        (1, torch.zeros(2, 6, 7, 35)),
        (2, torch.zeros(2, 6, 6, 18)),
        (3, 0),
        (4, -1),
        (6, 0),
        (8, -1),
        (14, 7),
    ],
)
def test_the_raw_kernels_refuse_what_does_not_fit(position: int, replacement: Any) -> None:
    """Before anything is launched, so on any machine."""
    from dcnv3 import triton_kernels

    raw: list[Any] = [torch.zeros(2, 6, 7, width) for width in (16, 36, 18)] + [
        2,
        3,
        3,
        1,
        1,
        1,
        1,
        1,
        1,
        1.0,
        False,
        0,
    ]
    with pytest.raises(ValueError, match="grad_output: expected the output's shape, got"):
        triton_kernels.backward(torch.zeros(2, 6, 7, 15), *raw, False)
    raw[position] = replacement
    with pytest.raises(ValueError, match=r"no such geometry|expected shape|channels must be"):
        triton_kernels.forward(*raw)
    with pytest.raises(ValueError, match=r"no such geometry|expected shape|channels must be"):
        triton_kernels.backward(torch.zeros(2, 6, 7, 16), *raw, False)
    packed = torch.cat(raw[1:3], -1) if raw[1].shape[:3] == raw[2].shape[:3] else raw[1]
    with pytest.raises(ValueError, match=r"no such geometry|expected shape|expected at least|channels must be"):
        triton_kernels.packed_forward(raw[0], packed, *raw[3:], False)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("center", [False, True], ids=["plain", "centre"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(architecture: int, dtype: str, center: bool) -> None:
    """With loads of 128 bits, and on sm_90 with reductions of four numbers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dcnv3 import triton_kernels

    compute = "fp64" if dtype == "fp64" else "fp32"
    constants = {"K": 9, "GEOMETRY": (3, 3, 1, 1, 1, 1, 1, 1, 1.0), "MIDDLE": 9, "ACTIVATION": 0}
    constants |= {"COMPUTE": getattr(triton.language, {"fp64": "float64", "fp32": "float32"}[compute])}
    constants |= {"CENTER": center, "BLOCK": 64, "BLOCK_K": 16, "BLOCK_C": 16}
    for kernel in (triton_kernels._forward, triton_kernels._backward):
        pointers = kernel.arg_names[: kernel.arg_names.index("pixels")]
        signature = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
        signature |= {name: f"*{compute if name == 'grad_value' else dtype}" for name in pointers}
        by_16 = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "channels")}
        at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=at, attrs=by_16)
        code = triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["ptx"]
        assert re.search(r"ld\.global(\.\w+)*\.(v4\.b32|v2\.b64)", code), kernel
        if kernel is triton_kernels._backward and architecture == 90 and compute == "fp32":
            assert ".add.v4.f32" in code


def test_on_a_machine_with_a_gpu_and_no_cuda_extension_triton_is_taken() -> None:
    """As far as a machine without one can show: the kernels register for CUDA tensors, and the backend is chosen."""
    script = """
import sys, torch
torch.cuda.is_available = lambda: True
sys.modules["dcnv3._C_cuda"] = None  # not built
import dcnv3
print(dcnv3.default_backend("cuda"), dcnv3.available_backends()["triton"])
names = ("forward", "backward", "packed_forward", "packed_backward")
print(all(torch._C._dispatch_has_kernel_for_dispatch_key(f"dcnv3::{name}", "CUDA") for name in names))
"""
    environment = os.environ | {"CC": "cc"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["triton", "None", "True"], done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_on_a_gpu_they_compute_the_definition_too(dtype: str, make_call: Any) -> None:
    """Also where the compiled kernels take their place."""
    from dcnv3 import triton_kernels
    from dcnv3.geometry import make_geometry

    call = make_call(group_channels=16, dtype=getattr(torch, dtype))
    tensors = [t.cuda() for t in (call.value, call.offset, call.mask)]
    geometry = make_geometry(**call.options)
    output = triton_kernels.forward(*tensors, *geometry)
    grads = triton_kernels.backward(call.cotangent.to(output), *tensors, *geometry, False)
    for have, want in zip((output, *grads), call.run("reference", "cpu", torch.float64).values(), strict=True):
        scale = max(float(want.abs().max()), 1.0)
        assert float((have.double().cpu() - want).abs().max()) <= TOLERANCE[dtype] * scale
