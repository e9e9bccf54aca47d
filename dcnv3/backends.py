"""Which implementations of the operator are here, and why the others are not."""

from __future__ import annotations

import importlib
import warnings
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


def default_backend(device: str = "cpu") -> str:
    """The backend of `auto` for tensors on `device` ("cpu", "cuda", ...): the compiled one, else `reference`."""
    return device if device in _REASONS and _REASONS[device] is None else "reference"


def check_name(backend: str | None) -> None:
    """ValueError where `backend` is none of the names, `auto` and None."""
    if not (backend is None or (isinstance(backend, str) and backend in ("auto", *NAMES))):
        raise ValueError(f"backend: expected auto or one of {', '.join(NAMES)}, got {backend!r}")


def choose(backend: str | None, device: str) -> str:
    """The backend for tensors on `device` ("cpu", "cuda", ...): the one asked for, else the best here.

    Warns, once a device, where `auto` falls to `reference` although there are kernels for the device.

    Raises:
        ValueError: an unknown backend, one that is not available, or one for another device.
    """
    check_name(backend)
    if backend is None or backend == "auto":
        best = default_backend(device)
        if best == "reference" and device in _REASONS and not torch.compiler.is_compiling():
            _warn_of_reference(device)
        return best
    reason = _REASONS[backend]
    if reason is not None:
        raise ValueError(f"backend: {backend} is not available: {reason}")
    if backend not in (device, "reference"):
        raise ValueError(f"backend: {backend} cannot take tensors on {device}")
    return backend


_WARNED: set[str] = set()


def _warn_of_reference(device: str) -> None:
    if device in _WARNED:
        return
    _WARNED.add(device)
    warnings.warn(
        f"dcnv3: tensors on {device} go through the slow reference backend: {device} is not available: "
        f'{_REASONS[device]}. backend="reference" asks for it without this warning.',
        stacklevel=4,
    )


__all__ = ["NAMES", "available_backends", "check_name", "choose", "default_backend", "registration"]
