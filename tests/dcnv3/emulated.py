"""What the tests of the emulated CUDA kernels share: the compiled emulator, types and tolerances, unaligned copies."""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import dcnv3

HERE = Path(__file__).parent / "emulation"
CSRC = Path(dcnv3.__file__).parent / "csrc"


TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]  # in the order of problem.h
TOLERANCE = dict(zip(TYPES, (1e-12, 4e-6, 1e-2, 1.5e-3), strict=True))


def compiled(built: Path) -> dict[int, ctypes.CDLL]:
    """The kernels before sm_90, and on it, where sums of float32 go out by fours, with a launch for each image."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulator with")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{CSRC}", f"-I{HERE}", str(HERE / "kernels.cpp")]
    built.mkdir(exist_ok=True)
    targets = {architecture: built / f"kernels_{architecture}.so" for architecture in (800, 900)}
    with open(built / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for architecture, target in targets.items():
            if not target.exists():
                own = [f"-DDCNV3_EMULATION={architecture}", "-o", str(target)]
                subprocess.run([*command, *own], check=True, timeout=300)
    libraries = {}
    for architecture, target in targets.items():
        loaded = ctypes.CDLL(str(target))
        loaded.run.argtypes = [ctypes.c_void_p, ctypes.c_double, ctypes.c_int, ctypes.c_int, ctypes.c_void_p] + [
            ctypes.c_int
        ] * 4
        loaded.run_norm.argtypes = [
            *[ctypes.c_int64] * 2,
            ctypes.c_double,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_int,
        ]
        loaded.message.restype = ctypes.c_char_p
        loaded.divide_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        libraries[architecture] = loaded
    return libraries


def shifted(tensor: torch.Tensor, start: int, gap: int) -> torch.Tensor:
    """The same numbers as a slice of the channels of a wider tensor: `gap` more elements a pixel, `start` before."""
    wide = torch.full((tensor.numel() // max(tensor.shape[-1], 1) * (tensor.shape[-1] + gap) + start,), torch.nan)
    view = wide.to(tensor.dtype)[start:].view(*tensor.shape[:-1], tensor.shape[-1] + gap)[..., : tensor.shape[-1]]
    return view.copy_(tensor)
