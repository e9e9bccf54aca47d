"""First step of every check: the machine, its versions, and kernels that load; built from source where none do.

A library that was built beforehand (in the wheelhouse, or in a wheel installed from it) is copied into dcnv3/, where an
in-place build would put it, unless one that works is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from machine import machine
from record import describe, headline, record
from steps import ROOT

STEP = "prepare"
TOOLKIT = Path("/usr/local/cuda")
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "timm",
    "transformers",
    "deepspeed",
    "pydantic",
    "open_clip_torch",
)
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,clocks.sm,power.limit,temperature.gpu"
WORKS = """
import sys, torch
import dcnv3._C_cuda
from dcnv3 import dcnv3
torch.manual_seed(0)
tensors = [torch.randn(2, 6, 7, width, dtype=torch.float64) for width in (32, 36, 18)]
found = []
for backend, device in (("reference", "cpu"), ("cuda", "cuda")):
    leaves = [t.to(device).requires_grad_() for t in tensors]
    output = dcnv3(*leaves, groups=2, backend=backend)
    found.append([output.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(output.sum(), leaves))])
for have, want in zip(*found, strict=True):
    torch.testing.assert_close(have, want)
"""


def versions() -> dict[str, str | None]:
    """Package -> version, None where it is missing."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def said(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def prebuilt(name: str, wheelhouse: Path | None) -> Iterator[Path]:
    """Libraries of this name outside the checkout: in the wheelhouse, then in packages that are installed."""
    if wheelhouse is not None:
        yield from sorted(wheelhouse.rglob(f"{name}.*so"))
    for folder in sys.path:
        path = Path(folder or ".").resolve()
        if path != ROOT:
            yield from sorted((path / "dcnv3").glob(f"{name}.*so"))


def built() -> Path:
    """The CUDA library, compiled for the GPU that is here. CalledProcessError with the compiler's words printed."""
    target = Path(tempfile.mkdtemp(prefix="dcnv3-build-"))
    major, minor = torch.cuda.get_device_capability()
    environment = {"DCNV3_CPU": "0", "DCNV3_CUDA": "1", "DCNV3_REQUIRE": "1"}
    environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    if "CUDA_HOME" not in os.environ and (TOOLKIT / "bin" / "nvcc").exists():
        environment["CUDA_HOME"] = str(TOOLKIT)  # an nvcc on the PATH may be a link from elsewhere
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(target)]
    command += ["--build-temp", str(target / "objects")]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True, timeout=180)
    return next((target / "dcnv3").glob("_C_cuda.*so"))


def put(library: Path) -> Path:
    """Copy a library into dcnv3/; where it lies then."""
    target = ROOT / "dcnv3" / library.name
    if library != target:
        part = target.with_suffix(".part")
        shutil.copyfile(library, part)
        part.replace(target)
    return target


def fault() -> str | None:
    """Why the CUDA library in dcnv3/ cannot be used on this GPU: the last line of a small run's error."""
    try:
        done = subprocess.run([sys.executable, "-c", WORKS], cwd=ROOT, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return "its first call takes more than 90 seconds"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]


def cuda_library(wheelhouse: Path | None) -> str:
    """Try what is here, then what was built beforehand, then the compiler; say where the library is from."""
    own = sorted((ROOT / "dcnv3").glob("_C_cuda.*so"))
    for where, libraries in (("the checkout", own), ("a build made beforehand", prebuilt("_C_cuda", wheelhouse))):
        for library in libraries:
            digest = hashlib.sha256(put(library).read_bytes()).hexdigest()
            why_not = fault()
            record(STEP, {"library": library.name, "from": where, "sha256": digest, "error": why_not})
            if why_not is None:
                return where
    began = time.monotonic()
    put(built())
    why_not = fault()
    record(STEP, {"library": "_C_cuda", "from": "a build", "s": round(time.monotonic() - began, 1), "error": why_not})
    if why_not is not None:
        raise SystemExit(f"Error: the CUDA kernels were built but do not work: {why_not}")
    return "a build made here"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheelhouse", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    found = versions()
    record(STEP, {"versions": found})
    if not list((ROOT / "dcnv3").glob("_C.*so")):
        for library in prebuilt("_C", options.wheelhouse):
            put(library)
            break
    if not torch.cuda.is_available():
        describe(machine())
        headline(STEP, f"torch {found['torch']}, no CUDA device")
        return
    describe(machine(device="cuda:0"))
    record(
        STEP,
        {
            "nvidia-smi": said("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"),
            "nvcc": said("nvcc", "-V"),
        },
    )
    name = torch.cuda.get_device_name(0)
    headline(STEP, f"{name}, torch {found['torch']}; no CUDA kernels that work")
    where = cuda_library(options.wheelhouse)
    backends = said(sys.executable, "-c", "import dcnv3, json; print(json.dumps(dcnv3.available_backends()))")
    record(STEP, {"backends": json.loads(backends or "null")})
    headline(STEP, f"{name}, torch {found['torch']}, kernels from {where}")


if __name__ == "__main__":
    main()
