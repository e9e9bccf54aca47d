"""`internimage doctor`: what this machine has, and what would make it better.

Every look is guarded: a broken library is a finding, not a crash.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import machine

PACKAGES = (
    "internimage-pretrain",
    "torch",
    "torchvision",
    "deepspeed",
    "timm",
    "open_clip_torch",
    "webdataset",
    "pyarrow",
    "numpy",
    "simplejpeg",
    "opencv-python-headless",
    "pillow",
    "typer",
)
_LOADER_WORKERS_A_RANK = 8  # each holds prefetched batches: a start until the run's own shards are measured
_SMALL_SHM = 2**30
_SMALL_DISK = 20 * 2**30


def examine(folder: Path | None = None) -> dict[str, Any]:
    """Everything as plain values; `advice` is a list of sentences, empty where nothing is amiss.

    folder: where runs will be written (its free disk counts); the current one by default.
    """
    torch = _torch()
    found: dict[str, Any] = {
        "system": _system(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(torch),
        "operator": _guarded(_operator_backends),
        "operator_default": _guarded(_operator_default),
        "communication": _communication(torch),
        "compilers": _compilers(),
        "memory": _memory(),
        "disk": _disk(folder or Path.cwd()),
        "loader": _loader(len(machine.gpu_names())),
    }
    found["advice"] = advise(found)
    return found


def advise(found: dict[str, Any]) -> list[str]:
    """What a person should do about `found`. Pure."""
    advice = []
    backends = found["operator"]
    if "error" in backends:
        advice.append(f"the operator cannot be imported ({backends['error']}): reinstall the package")
    elif backends.get("cpu") != "ready":
        advice.append("the operator's C++ backend is not built, so the CPU is slow: install a compiler and reinstall")
    if found["devices"]["gpus"] and backends.get("cuda") not in (None, "ready"):
        advice.append("there are GPUs but no CUDA operator: reinstall with the CUDA toolkit at hand (docs/operator.md)")
    if found["devices"]["gpus"] and not found["devices"]["torch_sees"]:
        advice.append("there are GPUs that torch does not see: its CUDA build and the driver do not fit together")
    for name in ("torch", "deepspeed", "timm", "open_clip_torch", "webdataset", "pyarrow"):
        if found["packages"][name] is None:
            advice.append(f"{name} is not installed: pip install {name}")
    if found["compilers"]["c++"] is None:
        advice.append("no C++ compiler: the operator cannot be built from source (Debian: apt-get install g++)")
    if found["disk"]["free"] < _SMALL_DISK:
        advice.append(
            f"{found['disk']['folder']} has {found['disk']['free'] / 2**30:.0f} GiB free: checkpoints need more"
        )
    shared = found["memory"]["shared_free"]
    if shared is not None and shared < _SMALL_SHM:
        advice.append("/dev/shm is small: start the container with --ipc=host or --shm-size, or set data.workers=0")
    return advice


def _system() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "cores": machine.usable_cores(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Any:
    try:
        import torch
    except Exception:  # a broken CUDA library raises OSError, a broken install anything
        return None
    return torch


def _devices(torch: Any) -> dict[str, Any]:
    seen: list[str] = []
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gigabytes, capability = properties.total_memory / 1e9, f"sm_{properties.major}{properties.minor}"
            seen.append(f"{properties.name}, {gigabytes:.0f} GB, {capability}")
    return {
        "gpus": machine.gpu_names(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "torch_cuda": getattr(getattr(torch, "version", None), "cuda", None),
        "torch_sees": seen,
        "ranks_of_auto": machine.resolve_processes("auto"),
    }


def _operator_backends() -> dict[str, str]:
    import dcnv3

    return {name: "ready" if why is None else why for name, why in dcnv3.available_backends().items()}


def _operator_default() -> dict[str, str]:
    """What backend="auto" takes for tensors of each device."""
    import dcnv3

    return {device: dcnv3.default_backend(device) for device in ("cpu", "cuda")}


def _communication(torch: Any) -> dict[str, Any]:
    if torch is None or not torch.distributed.is_available():
        return {"nccl": None, "gloo": False}
    nccl = None
    if torch.distributed.is_nccl_available():
        with contextlib.suppress(Exception):
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"nccl": nccl, "gloo": torch.distributed.is_gloo_available()}


def _compilers() -> dict[str, str | None]:
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(f"{home}/bin/nvcc") if home else shutil.which("nvcc")
    return {
        "c++": _first_line([cxx, "--version"]) if cxx else None,
        "nvcc": _last_line([nvcc, "--version"]) if nvcc else None,
        "ninja": shutil.which("ninja"),
    }


def _memory() -> dict[str, Any]:
    shared = None
    with contextlib.suppress(OSError):
        shared = shutil.disk_usage("/dev/shm").free
    available = None
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    return {"total": machine.memory_bytes(), "available": available, "shared_free": shared}


def _disk(folder: Path) -> dict[str, Any]:
    usage = shutil.disk_usage(folder)
    return {"folder": str(folder), "free": usage.free, "total": usage.total}


def _loader(gpus: int) -> dict[str, Any]:
    """Decoding workers: the cores, less one for each rank's own process, shared out among the ranks."""
    cores, ranks = machine.usable_cores(), max(1, gpus)
    workers = max(0, min(_LOADER_WORKERS_A_RANK, cores // ranks - 1))
    return {
        "cores_a_rank": cores / ranks,
        "suggested": f"data.workers={workers}",
        "measure_with": "internimage inspect loader CONFIG",
    }


def _guarded(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return look()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _first_line(command: list[str]) -> str | None:
    return next(iter(_output(command)), None)


def _last_line(command: list[str]) -> str | None:
    return next(iter(reversed(_output(command))), None)


def _output(command: list[str]) -> list[str]:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
