"""The norms' CUDA kernels, run on the CPU by the warp emulator (emulation/)."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulated import TOLERANCE, TYPES, shifted

NORMS = [(1, 8), (37, 64), (300, 16), (5, 80), (70, 5), (19, 320), (33, 1000), (3, 3)]  # rows, channels


@pytest.mark.parametrize("gelu", [True, False], ids=["gelu", "plain"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "channels"), NORMS, ids=str)
def test_the_cuda_norms_compute_the_definition(
    libraries: dict[int, ctypes.CDLL], rows: int, channels: int, dtype: torch.dtype, gelu: bool
) -> None:
    """In lane groups of part of a warp and of a whole one, one round of the channels and several, aligned and not."""
    torch.manual_seed(0)
    given = [2 * torch.randn(rows, channels) + 0.5, torch.randn(channels), torch.randn(channels)]
    cotangent, again = torch.randn(2, rows, channels).to(dtype)
    leaves = [t.to(dtype).double().requires_grad_() for t in given]
    normal = torch.nn.functional.layer_norm(leaves[0], (channels,), leaves[1], leaves[2], 1e-6)
    before, factor = torch.randn(rows, channels).to(dtype), torch.randn(rows if rows % 2 else rows // 2).to(dtype)
    each = factor if rows % 2 else factor.repeat_interleave(2)
    output = torch.nn.functional.gelu(normal) if gelu else before.double() + each.double()[:, None] * normal
    slope = cotangent.double() if gelu else cotangent.double() + again.double()  # of the second reader of a branch
    expected = [output.detach(), *torch.autograd.grad(output, leaves, slope)]
    if not gelu:
        expected[1] = expected[1] + cotangent  # as the gradient of a residual
    for start in (0, 1):  # at an odd address a lane moves one element
        x, weight, bias, grad, more, residual = (
            shifted(t.to(dtype), start, 0) for t in (*given, cotangent, again, before)
        )
        results = [shifted(torch.full_like(t, torch.nan), start, 0) for t in (x, x, weight, bias)]
        statistics = [torch.full((rows,), torch.nan, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2)]
        everything = [x, weight, bias, results[0], *statistics, grad, *results[1:]]
        others = [None] * 4 if gelu else [t.data_ptr() for t in (grad, residual, factor, more)]
        pointers = (ctypes.c_void_p * 14)(*(t.data_ptr() for t in everything), *others)
        moved = {
            libraries[800].run_norm(rows, channels, 1e-6, gelu, pointers, TYPES.index(dtype), backward)
            for backward in (0, 1)
        }
        width = 16 // dtype.itemsize
        assert moved == {1 if start or channels % width else width}
        for have, want in zip(results, expected, strict=True):
            assert float((have.double() - want).abs().max()) <= TOLERANCE[dtype] * max(float(want.abs().max()), 1.0)


def test_a_norm_of_more_channels_than_shared_memory_holds_is_refused(libraries: dict[int, ctypes.CDLL]) -> None:
    """By the launcher; dcnv3.fused leaves these to PyTorch: 3 numbers a channel in 40 KiB."""
    room = torch.empty(3414)
    pointers = (ctypes.c_void_p * 14)(*[room.data_ptr()] * 14)
    answers = [libraries[800].run_norm(0, channels, 1e-6, 1, pointers, 1, 1) for channels in (3413, 3414)]
    assert answers == [1, -1]  # one element at a time
