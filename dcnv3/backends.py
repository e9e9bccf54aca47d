"""Which implementations of the operator are here, and why the others are not."""

from __future__ import annotations

import importlib
import os
import shutil
import warnings
from types import ModuleType

import torch

from dcnv3 import registration  # the operators must be defined before the extensions add kernels to them
from dcnv3.geometry import BACKENDS, check_backend

_DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # whose tensors each takes, the best first


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


_REASONS = {name: _reason(name) for name in BACKENDS if name != "triton"}


def _triton_reason() -> str | None:
    """Why the Triton kernels do not serve the CUDA devices here; None where they now do."""
    if _REASONS["cuda"] is None:
        return "the compiled cuda backend is here, in its place"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if not (os.environ.get("CC") or any(shutil.which(name) for name in ("gcc", "clang", "cc", "cl"))):
        return "Triton needs a C compiler at its first call"
    kernels, error = _load("triton_kernels")
    if kernels is None:
        return f"Triton cannot be imported ({error}); pip install triton"
    its = kernels.forward, kernels.backward, kernels.packed_forward, kernels.packed_backward
    registration.register("CUDA", *its)
    return None


_REASONS["triton"] = _triton_reason()


def available_backends() -> dict[str, str | None]:
    """Backend name -> None when it can be used here, else the reason why not.

    `cpu` and `cuda` are the compiled kernels, `triton` takes the place of `cuda` where that was not built, `reference`
    is plain PyTorch on any device.
    """
    return {name: _REASONS[name] for name in BACKENDS}


def default_backend(device: str = "cpu") -> str:
    """The backend of `auto` for tensors on `device` ("cpu", "cuda", ...): the best that is here."""
    for name, its in _DEVICES.items():
        if its == device and _REASONS[name] is None:
            return name
    return "reference"


def choose(backend: str | None, device: str) -> str:
    """The backend for tensors on `device` ("cpu", "cuda", ...): the one asked for, else the best here.

    Warns, once a device, where `auto` falls to `reference` although there are kernels for the device.

    Raises:
        ValueError: an unknown backend, one that is not available, or one for another device.
    """
    check_backend(backend)
    if backend is None or backend == "auto":
        best = default_backend(device)
        if best == "reference" and device in _DEVICES.values() and not torch.compiler.is_compiling():
            _warn_of_reference(device)
        return best
    reason = _REASONS[backend]
    if reason is not None:
        raise ValueError(f"backend: {backend} is not available: {reason}")
    if _DEVICES.get(backend, device) != device:
        raise ValueError(f"backend: {backend} cannot take tensors on {device}")
    return backend


_WARNED: set[str] = set()


def _warn_of_reference(device: str) -> None:
    if device in _WARNED:
        return
    _WARNED.add(device)
    reasons = "; ".join(f"{name}: {_REASONS[name]}" for name, its in _DEVICES.items() if its == device)
    warnings.warn(
        f"dcnv3: tensors on {device} go through the slow reference backend ({reasons}). "
        'backend="reference" asks for it without this warning.',
        stacklevel=4,
    )


__all__ = ["available_backends", "choose", "default_backend", "registration"]
