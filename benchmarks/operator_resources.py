"""What the compiler makes of the CUDA kernels, without a GPU: registers, spills, occupancy, accesses, lengths of loops.

    python benchmarks/operator_resources.py            # compiles for sm_80, sm_90 and sm_100, writes results/
    python benchmarks/operator_resources.py --check    # compares with the recorded numbers, fails where worse

Needs nvcc with its C++ compiler, and a disassembler (cuobjdump and nvdisasm: from the toolkit, or those that Triton
carries). Occupancy is that of the launches: their warps and shared memory (launch.h) beside the registers, for 3 by 3
kernels. The record holds a digest of the kernels' code, so that a test tells when it is of other kernels.

The loop over the points is counted in the disassembly. A loop is the code from the target of a backward branch to the
branch. The loop over the points is the innermost that reads the table of the points (LDS.128) and reads global memory
four or more times; where the compiler has unrolled it and kept a remainder, the one with fewer instructions a point.
`instructions` are all in it, branches that a launch never takes included; `points` are its global loads by
four, the pixels around a point. A loop inside, as over the four pixels in the deterministic mode, counts once.
Results: benchmarks/results/operator_resources.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from machine import machine

HERE = Path(__file__).parent
CSRC = HERE.parent / "dcnv3" / "csrc"
SOURCES = CSRC / "cuda"
RESULTS = HERE / "results" / "operator_resources.json"
REGISTERS = 65536  # of a multiprocessor, in four quarters
WARPS, BLOCKS = 64, 32  # of a multiprocessor
# Bytes of a multiprocessor; each block takes 1 KiB more than it asks for.
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
TILE_BYTES = (16 * 12 + 3 * 9) * 32 * 4  # kTileBytes of launch.h
GROUP_CHANNELS = (16, 32)  # of the published models
NORM_CHANNELS = 320  # of H's first stage
SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
TYPES = {"d": "float64", "f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def find(tool: str) -> str | None:
    """A CUDA tool: on the path, in CUDA_HOME, or Triton's."""
    triton = importlib.util.find_spec("triton")
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which(tool) or next((str(p / tool) for p in places if (p / tool).exists()), None)


def kernel_name(mangled: str) -> str | None:
    """forward bfloat16 x8 of 16, or None for a kernel that is not of interest.

    `points` is backward without the value's gradient, which `tiles` then makes (tiles.cuh).
    x8: channels that a lane moves at once; of 16: channels of a group that the kernel is compiled for, with 9 points.
    """
    if norm := re.search(r"\d+norm_(forward|backward)_kernelI(d|f|6__half|13__nv_bfloat16)Li(\d)ELb([01])E", mangled):
        return f"norm {norm[1]} {TYPES[norm[2]]} x{norm[3]}{' gelu' if norm[4] == '1' else ''}"
    if tiles := re.search(r"tile_kernelI(f|6__half|13__nv_bfloat16)([fy])E", mangled):
        return f"tiles {TYPES[tiles[1]]}{' deterministic' if tiles[2] == 'y' else ''}"
    found = r"\d+(forward|backward)_kernelI(d|f|6__half|13__nv_bfloat16)Li(\d)ELi(n?\d)E([dfy]|NS0_9ElsewhereE)?E"
    match = re.search(found, mangled)
    if match is None:
        return None
    only = "" if match[4] == "n1" else f" of {int(match[3]) << int(match[4])}"
    direction = "points" if match[5] and "Elsewhere" in match[5] else match[1]
    return f"{direction} {TYPES[match[2]]} x{match[3]}{only}{' deterministic' if match[5] == 'y' else ''}"


def digest() -> str:
    """Of the kernels' code, without its comments and line breaks."""
    files = [path for path in sorted(SOURCES.iterdir()) if path.suffix in (".cu", ".cuh", ".h")]
    files += [CSRC / name for name in ("norm.h", "packed.h", "problem.h", "sampling.h")]
    code = [re.sub(r"//[^\n]*", "", path.read_text()) for path in files]
    return hashlib.sha256(" ".join("\n".join(code).split()).encode()).hexdigest()


def occupancy(architecture: int, registers: int, warps: int, shared: int) -> int:
    """Percent of a multiprocessor's warps that are there at once; `warps` and `shared` bytes are a block's."""
    by_registers = REGISTERS // 4 // (-(-registers // 8) * 8 * 32) * 4 // warps
    blocks = min(by_registers, SHARED[architecture] // (shared + 1024), WARPS // warps, BLOCKS)
    return blocks * warps * 100 // WARPS


PLANS = """
#include "cuda/launch.h"
#include "cuda/norm_plan.h"
#include <cstdio>
#include <initializer_list>
int main() {
  for (int channels : {%s})
    for (int size : {4, 8})
      for (int vector : {1, 2, 4, 8})
        for (bool backward : {false, true}) {
          dcnv3::Problem q{};
          q.points = 9, q.groups = 4, q.group_channels = channels, q.batch = 1, q.out_height = q.out_width = 56;
          const auto plan = dcnv3::gpu::make_plan(q, size, vector, backward);
          std::printf("%%d %%d %%d %%d %%d %%zu\\n", channels, size, vector, backward, plan.warps, plan.shared);
        }
  for (int size : {4, 8})
    for (int vector : {1, 2, 4, 8})
      for (bool backward : {false, true}) {
        const auto plan = dcnv3::gpu::norm_plan({1 << 16, %d, 1e-6, true}, size, vector, backward);
        std::printf("%d %%d %%d %%d %%d %%zu\\n", size, vector, backward, plan.warps, plan.shared);
      }
}
"""


def launch_plans(folder: Path) -> dict[tuple[int, int, int, bool], tuple[int, int]]:
    """(group channels, bytes of a number, channels a lane, backward) -> (warps, bytes of shared memory) of a block."""
    source, program = folder / "plans.cpp", folder / "plans"
    source.write_text(PLANS % (", ".join(map(str, GROUP_CHANNELS)), NORM_CHANNELS, NORM_CHANNELS))
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    subprocess.run([compiler, "-std=c++17", f"-I{CSRC}", str(source), "-o", str(program)], check=True, timeout=120)
    printed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    rows = [[int(number) for number in line.split()] for line in printed.splitlines()]
    return {(row[0], row[1], row[2], bool(row[3])): (row[4], row[5]) for row in rows}


def launches(kernel: str, registers: int, architecture: int, plans: dict[Any, tuple[int, int]]) -> dict[str, Any]:
    """What one kernel is launched with: group channels -> warps, shared memory, occupancy."""
    if kernel.startswith("tiles"):
        percent = occupancy(architecture, registers, 1, TILE_BYTES)
        return {"any channels": {"warps": 1, "shared_bytes": TILE_BYTES, "occupancy_percent": percent}}
    if kernel.startswith("norm"):
        _, direction, dtype, vector = kernel.split()[:4]
        warps, shared = plans[NORM_CHANNELS, max(SIZES[dtype], 4), int(vector[1:]), direction == "backward"]
        percent = occupancy(architecture, registers, warps, shared)
        return {f"{NORM_CHANNELS} channels": {"warps": warps, "shared_bytes": shared, "occupancy_percent": percent}}
    direction, dtype, vector = kernel.split()[:3]
    only = re.search(r" of (\d+)", kernel)
    found = {}
    for channels in (int(only[1]),) if only else GROUP_CHANNELS:
        size = max(SIZES[dtype], 4)  # of the arithmetic
        warps, shared = plans[channels, size, int(vector[1:]), direction != "forward"]
        percent = occupancy(architecture, registers, warps, shared)
        found[f"{channels} channels"] = {"warps": warps, "shared_bytes": shared, "occupancy_percent": percent}
    return found


def functions(listing: str) -> dict[str, list[tuple[int, str]]]:
    """From cuobjdump's listing: a function's name -> its instructions, each with its address."""
    found: dict[str, list[tuple[int, str]]] = {}
    code: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if entry := re.search(r"Function : (\w+)", line):
            code = found.setdefault(entry[1], [])
        elif instruction := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            code.append((int(instruction[1], 16), instruction[2].strip()))
    return found


def point_loop(code: list[tuple[int, str]]) -> dict[str, int]:
    """Instructions and points of one round of the loop over the points (see above)."""
    loops: list[tuple[int, int, dict[str, int]]] = []
    for end, text in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        start = int(branch[1], 16) if branch else end + 1
        if start > end:
            continue
        body = [inside for at, inside in code if start <= at <= end]
        loads = sum(1 for inside in body if re.search(r"\bLDG\b", inside))
        outer = any(start <= other[0] and other[1] <= end for other in loops)
        if loads >= 4 and not outer and any(re.search(r"\bLDS\.128\b", inside) for inside in body):
            loops.append((start, end, {"instructions": len(body), "points": loads // 4}))
    return min((loop for _, _, loop in loops), key=lambda loop: loop["instructions"] / loop["points"])


def compile_kernels(architecture: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Kernel name -> numbers, for one architecture."""
    nvcc, cuobjdump, nvdisasm = find("nvcc"), find("cuobjdump"), find("nvdisasm")
    if nvcc is None:
        raise SystemExit("nvcc is not here: set CUDA_HOME")
    kernels: dict[str, dict[str, Any]] = {}
    plans = launch_plans(folder)
    for name in ("forward", "backward", "norm"):
        built = folder / f"{name}_{architecture}.cubin"
        command = [nvcc, "-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-arch=sm_{architecture}", "-cubin"]
        made = subprocess.run(
            [*command, "-Xptxas", "-v", str(SOURCES / f"{name}.cu"), "-o", str(built)],
            capture_output=True,
            text=True,
            check=True,
            timeout=1800,
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
                numbers["launches"] = launches(current, int(used[1]), architecture, plans)
        if cuobjdump is None or nvdisasm is None:
            continue
        environment = os.environ | {"PATH": f"{Path(nvdisasm).parent}:{os.environ['PATH']}"}
        listing = subprocess.run(
            [cuobjdump, "-sass", str(built)], capture_output=True, text=True, check=True, env=environment, timeout=120
        )
        for mangled, code in functions(listing.stdout).items():
            if kernel := kernel_name(mangled):
                if not kernel.startswith(("tiles", "norm")):
                    kernels[kernel]["point_loop"] = point_loop(code)
                else:
                    kernels[kernel]["instructions"] = len(code)
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
    """What is worse in `new` than recorded: spills, occupancy, fewer 128-bit accesses or more narrower ones."""
    found = []
    for kernel, numbers in old.items():
        have = new.get(kernel)
        if have is None:
            found.append(f"{kernel}: no longer there")
            continue
        if have["spill_bytes"] > numbers["spill_bytes"]:
            found.append(f"{kernel}: {have['spill_bytes']} bytes spilled, {numbers['spill_bytes']} recorded")
        for channels, launch in numbers["launches"].items():
            now = have["launches"][channels]["occupancy_percent"]
            if now < launch["occupancy_percent"]:
                found.append(f"{kernel}, {channels}: occupancy {now} %, {launch['occupancy_percent']} recorded")
        for kind in ("loads", "stores", "atomics"):
            if kind not in have and "loads" not in have:
                continue  # no disassembler here
            now, before = have.get(kind, {}), numbers.get(kind, {})
            if now.get("128", 0) < before.get("128", 0):
                found.append(f"{kernel}: {now.get('128', 0)} {kind} of 128 bits, {before['128']} recorded")
            narrow, known = (sum(n for width, n in widths.items() if width != "128") for widths in (now, before))
            if narrow > known:
                found.append(f"{kernel}: {narrow} {kind} of less than 128 bits, {known} recorded")
        if "instructions" in have and have["instructions"] > numbers["instructions"]:
            found.append(f"{kernel}: {have['instructions']} instructions, {numbers['instructions']} recorded")
        if "point_loop" in have:
            loops = have["point_loop"], numbers["point_loop"]
            length, known = (loop["instructions"] / loop["points"] for loop in loops)
            if length > known:
                found.append(f"{kernel}: {length:.0f} instructions a point, {known:.0f} recorded")
    return found


def nvcc_version() -> str | None:
    nvcc = find("nvcc")
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    version = re.search(r"V([\d.]+)", printed)
    return version[1] if version else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = {f"sm_{a}": compile_kernels(a, Path(folder)) for a in SHARED}
    nvcc = nvcc_version()
    if options.check:
        recorded = json.loads(RESULTS.read_text())
        found = [f"{a} {line}" for a in report for line in worse(report[a], recorded["kernels"][a])]
        if found:
            note = "" if nvcc == recorded["nvcc"] else f"\n(recorded with nvcc {recorded['nvcc']}, this is {nvcc})"
            raise SystemExit("\n".join(found) + note)
        print("no kernel is worse than recorded")
        return
    record = {"benchmark": "operator_resources", "machine": machine(), "nvcc": nvcc, "sources": digest()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record | {"kernels": report}, indent=1) + "\n")
    for architecture, kernels in report.items():
        for kernel, numbers in sorted(kernels.items()):
            print(architecture, kernel, numbers)


if __name__ == "__main__":
    main()
