"""Which implementations of the operator are here, and why the others are not."""

from __future__ import annotations

import importlib

import torch

_NATIVE_ERROR: str | None
try:
    importlib.import_module("dcnv3._C")  # registers the CPU (and, when built, the CUDA) kernels
    _NATIVE_ERROR = None
except ImportError as error:
    _NATIVE_ERROR = (
        f"the compiled extension dcnv3._C could not be imported ({error}); "
        "reinstall with a C++17 compiler at hand to build it"
    )

NAMES = ("cpu", "cuda", "reference")


def _has_kernel(device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("dcnv3::forward", device.upper())


def _reason(name: str) -> str | None:
    if name == "reference":
        return None
    if _NATIVE_ERROR is not None:
        return _NATIVE_ERROR
    if name == "cuda":
        if not _has_kernel("cuda"):
            return "dcnv3._C was built without CUDA; rebuild with DCNV3_CUDA=1 and a CUDA toolkit"
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
    return None


def available_backends() -> dict[str, str | None]:
    """Backend name -> None when it can be used here, else the reason why not.

    `cpu` and `cuda` are the compiled kernels, `reference` is plain PyTorch on any device.
    """
    return {name: _reason(name) for name in NAMES}
