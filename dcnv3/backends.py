"""Which implementations of the operator are here, and why the others are not."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from dcnv3 import registration  # the operators must be defined before the extensions add kernels to them

NAMES = ("cpu", "cuda", "reference")


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The extension, or None and why: importing it registers its kernels."""
    try:
        return importlib.import_module(f"dcnv3.{name}"), ""
    except ImportError as error:
        return None, str(error)


_C, _CPU_ERROR = _load("_C")
_CUDA, _CUDA_ERROR = _load("_C_cuda")


def _reason(name: str) -> str | None:
    if name == "cpu" and _C is None:
        return f"its extension cannot be imported ({_CPU_ERROR}); reinstall where a C++ compiler is at hand"
    if name == "cuda":
        if _CUDA is None:
            return (
                f"its extension cannot be imported ({_CUDA_ERROR}); reinstall with a CUDA toolkit and DCNV3_CUDA=1 "
                "(docs/operator.md)"
            )
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
    return None


_REASONS = {name: _reason(name) for name in NAMES}


def available_backends() -> dict[str, str | None]:
    """Backend name -> None when it can be used here, else the reason why not.

    `cpu` and `cuda` are the compiled kernels, `reference` is plain PyTorch on any device.
    """
    return dict(_REASONS)


def choose(backend: str | None, device: str) -> str:
    """The backend for tensors on `device` ("cpu", "cuda", ...): the one asked for, else the best here.

    Raises:
        ValueError: an unknown backend, one that is not available, or one for another device.
    """
    if backend is None or backend == "auto":
        return device if device in _REASONS and _REASONS[device] is None else "reference"
    if backend not in _REASONS:
        raise ValueError(f"backend: expected auto or one of {', '.join(NAMES)}, got {backend!r}")
    reason = _REASONS[backend]
    if reason is not None:
        raise ValueError(f"backend: {backend} is not available: {reason}")
    if backend not in (device, "reference"):
        raise ValueError(f"backend: {backend} cannot take tensors on {device}")
    return backend


__all__ = ["NAMES", "available_backends", "choose", "registration"]
