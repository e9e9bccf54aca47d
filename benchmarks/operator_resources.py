"""What the compiler makes of the CUDA kernels, without a GPU: registers, spills, occupancy, widths of memory accesses.

    python benchmarks/operator_resources.py            # compiles for sm_80 and sm_90, writes results/
    python benchmarks/operator_resources.py --check    # compares with the recorded numbers , fails where worse

Needs nvcc, and a disassembler (cuobjdump and nvdisasm: from the toolkit, or those that Triton carries).
Results: benchmarks/results/operator_resources.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCES = HERE.parent / "dcnv3" / "csrc" / "cuda"
RESULTS = HERE / "results" / "operator_resources.json"
ARCHITECTURES = (80, 90)
THREADS = 256  # of a block
REGISTERS = 65536  # of a multiprocessor, both architectures
TYPES = {"d": "float64", "f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def find(tool: str) -> str | None:
    """A CUDA tool: on the path, in CUDA_HOME, or Triton's."""
    triton = importlib.util.find_spec("triton")
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which(tool) or next((str(p / tool) for p in places if (p / tool).exists()), None)


def kernel_name(mangled: str) -> str | None:
    """forward bfloat16 x8, or None for a kernel that is not of interest."""
    match = re.search(r"\d+(forward|backward)_kernelI(d|f|6__half|13__nv_bfloat16)Li(\d)E([dfy]?)E", mangled)
    if match is None:
        return None
    fixed = " deterministic" if match[4] == "y" else ""
    return f"{match[1]} {TYPES[match[2]]} x{match[3]}{fixed}"


def occupancy(registers: int) -> int:
    """Percent of a multiprocessor's 64 warps that the registers allow."""
    per_block = -(-registers // 8) * 8 * THREADS
    return min(REGISTERS // per_block * THREADS // 32, 64) * 100 // 64


def compile_kernels(architecture: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Kernel name -> numbers, for one architecture."""
    nvcc, cuobjdump, nvdisasm = find("nvcc"), find("cuobjdump"), find("nvdisasm")
    if nvcc is None:
        raise SystemExit("nvcc is not here: set CUDA_HOME")
    kernels: dict[str, dict[str, Any]] = {}
    for name in ("forward", "backward"):
        built = folder / f"{name}_{architecture}.cubin"
        command = [nvcc, "-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-arch=sm_{architecture}", "-cubin"]
        made = subprocess.run(
            [*command, "-Xptxas", "-v", str(SOURCES / f"{name}.cu"), "-o", str(built)],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        current = None
        for line in made.stderr.splitlines():
            if entry := re.search(r"Compiling entry function '(\w+)'", line):
                current = kernel_name(entry[1])
            elif current and (spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)):
                kernels.setdefault(current, {})["spill_bytes"] = int(spills[1]) + int(spills[2])
            elif current and (used := re.search(r"Used (\d+) registers", line)):
                numbers = kernels.setdefault(current, {})
                numbers["registers"] = int(used[1])
                numbers["occupancy_percent"] = occupancy(int(used[1]))
        if cuobjdump is None or nvdisasm is None:
            continue
        environment = os.environ | {"PATH": f"{Path(nvdisasm).parent}:{os.environ['PATH']}"}
        listing = subprocess.run(
            [cuobjdump, "-sass", str(built)], capture_output=True, text=True, check=True, env=environment, timeout=120
        )
        for line in listing.stdout.splitlines():
            if entry := re.search(r"Function : (\w+)", line):
                current = kernel_name(entry[1])
            elif current and (access := re.search(r"\b(LDG|STG|RED|REDG|ATOMG)\.(\S+)", line)):
                kind = {"LDG": "loads", "STG": "stores"}.get(access[1], "atomics")
                vector = re.search(r"128|F32x4|64|U16", access[2])
                width = {"128": 128, "F32x4": 128, "64": 64, "U16": 16}.get(vector[0] if vector else "", 32)
                widths = kernels.setdefault(current, {}).setdefault(kind, {})
                widths[str(width)] = widths.get(str(width), 0) + 1
    return kernels


def worse(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """What is worse in `new` than recorded: spills, occupancy, or 128-bit accesses that became narrower."""
    found = []
    for kernel, numbers in old.items():
        have = new.get(kernel)
        if have is None:
            found.append(f"{kernel}: no longer there")
            continue
        if have["spill_bytes"] > numbers["spill_bytes"]:
            found.append(f"{kernel}: {have['spill_bytes']} bytes spilled, {numbers['spill_bytes']} recorded")
        if have["occupancy_percent"] < numbers["occupancy_percent"]:
            found.append(f"{kernel}: occupancy {have['occupancy_percent']} %, {numbers['occupancy_percent']} recorded")
        for kind in ("loads", "atomics"):
            if kind in have and numbers.get(kind, {}).get("128") and not have[kind].get("128"):
                found.append(f"{kernel}: no 128-bit {kind} any more")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = {f"sm_{a}": compile_kernels(a, Path(folder)) for a in ARCHITECTURES}
    if options.check:
        recorded = json.loads(RESULTS.read_text())["kernels"]
        found = [f"{a} {line}" for a in report for line in worse(report[a], recorded[a])]
        if found:
            raise SystemExit("\n".join(found))
        print("no kernel is worse than recorded")
        return
    nvcc = subprocess.run([find("nvcc") or "nvcc", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"V([\d.]+)", nvcc)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"nvcc": version[1] if version else None, "kernels": report}, indent=1) + "\n")
    for architecture, kernels in report.items():
        for kernel, numbers in sorted(kernels.items()):
            print(architecture, kernel, numbers)


if __name__ == "__main__":
    main()
