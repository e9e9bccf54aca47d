"""The CPU kernels of every instruction set this processor has, not only of the best one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcnv3.fused import built

SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from dcnv3 import dcnv3, gelu, norm_gelu
import dcnv3._C as kernels

asked = sys.argv[1]
if kernels.cpu_isa() != asked:
    raise SystemExit(9)
torch.manual_seed(0)
tolerances = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
for dtype, tolerance in tolerances.items():
    for channels in (1, 5, 8, 16, 24, 32, 64):
        for kernel, activation in ((3, "softmax"), (5, "softmax"), (2, "sigmoid")):
            size, points = 7 - kernel + 1 + 2, kernel * kernel
            tensors = [
                torch.randn(2, 7, 7, 3 * channels).to(dtype),
                (2 * torch.randn(2, size, size, 3 * points * 2)).to(dtype),
                torch.randn(2, size, size, 3 * points).to(dtype),
            ]
            cotangent = torch.randn(2, size, size, 3 * channels).to(dtype)
            results = []
            for backend, compute in (("cpu", dtype), ("reference", torch.float64)):
                leaves = [t.detach().to(compute).requires_grad_() for t in tensors]
                output = dcnv3(*leaves, groups=3, kernel_size=kernel, mask_activation=activation, backend=backend)
                output.backward(cotangent.to(compute))
                results.append([output.detach(), *(leaf.grad for leaf in leaves)])
            for have, want in zip(*results, strict=True):
                worst = float((have.double() - want).abs().max() / want.abs().max())
                assert worst <= tolerance, (dtype, channels, kernel, worst)
    for channels in (1, 5, 16, 37):
        tensors = [torch.randn(9, channels), torch.randn(channels), torch.randn(channels)]
        results = []
        for compute in (dtype, torch.float64):
            x, w, b = leaves = [t.to(dtype, copy=True).to(compute).detach().requires_grad_() for t in tensors]
            norm = norm_gelu if compute == dtype else lambda x, w, b, eps: F.gelu(F.layer_norm(x, w.shape, w, b, eps))
            output = norm(x, w, b, 1e-6) + (gelu(x) if compute == dtype else F.gelu(x))
            output.backward(torch.ones_like(output))
            results.append([output.detach(), *(leaf.grad for leaf in leaves)])
        for have, want in zip(*results, strict=True):
            worst = float((have.double() - want).abs().max() / (want.abs().max() + 1))
            assert worst <= tolerance, (dtype, channels, worst)
"""


@pytest.mark.skipif(not built("norm_forward", "cpu"), reason="the CPU kernels are not built here")
@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_the_kernels_of_this_instruction_set_compute_the_definition(name: str) -> None:
    environment = os.environ | {"DCNV3_CPU_ISA": name, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name], env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode == 9:
        pytest.skip(f"this processor has no {name}")
    assert done.returncode == 0, done.stderr
