"""compute-sanitizer over small calls of both kernels: accesses outside (memcheck), races in shared memory (racecheck).

The calls are of the plain and the packed operator. Run with --calls it makes them; else it runs itself so under each
tool.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time

import torch
from record import headline, not_here, record, small

STEP = "sanitizer"
TOOLS = {"memcheck": 60.0, "racecheck": 60.0}  # and their limits in seconds
SUMMARY = re.compile(r"=========\s+(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)(.*)")
# channels of a group, kernel, whether the tensors are slices that 128-bit loads do not fit
SHAPES = [(16, 3, False), (32, 3, False), (5, 3, False), (16, 3, True), (8, 7, False)]


def calls(device: torch.device) -> int:
    """Forward and backward, plain and packed with a centre, of each dtype and shape, adding in any order and in the
    deterministic one; their number."""
    import dcnv3  # noqa: F401  # registers the operators

    made = 0
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for channels, kernel, slices in SHAPES:
            groups, points = 2, kernel * kernel
            geometry = (groups, kernel, kernel, 1, 1, kernel // 2, kernel // 2, 1, 1, 1.0, False, 0)
            tensors = []
            # the places of one pixel: two columns of padding, and one more beside slices, so that rows are odd
            places = groups * (3 * points + 1) + 2 + slices
            for width in (groups * channels, groups * points * 2, groups * points, groups * channels, places):
                wide = torch.randn(1, 5, 4, width + 2 * slices).to(device, dtype)
                tensors.append(wide[..., 1 : 1 + width] if slices else wide)
            value, offset, mask, gradient, packed = tensors
            torch.ops.dcnv3.forward(value, offset, mask, *geometry)
            torch.ops.dcnv3.packed_forward(value, packed, *geometry, True)
            for deterministic in (False, True):
                torch.ops.dcnv3.backward(gradient, value, offset, mask, *geometry, deterministic)
                torch.ops.dcnv3.packed_backward(gradient, value, packed, *geometry, True, deterministic)
            made += 6
    if device.type == "cuda":
        torch.cuda.synchronize()
    return made


def summary(printed: str) -> tuple[int, str] | None:
    """(errors or hazards, the rest of the line) of a tool's last summary; None where it printed none."""
    found = SUMMARY.findall(printed)
    return (int(found[-1][0]), found[-1][1].strip()) if found else None


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "--calls" in sys.argv:
        print(f"{calls(device)} calls")
        return
    if device.type != "cuda":
        record(STEP, {"calls": calls(device), "device": "cpu"})
        not_here(STEP, "no CUDA device")
    if shutil.which("compute-sanitizer") is None:
        not_here(STEP, "no compute-sanitizer")
    said, bad = [], False
    for tool, limit in TOOLS.items():
        command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", sys.executable, __file__, "--calls"]
        began = time.monotonic()
        # without PyTorch's cache an access past a tensor is one past an allocation
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
            )
            printed, ended = done.stdout, f"exit {done.returncode}"
        except subprocess.TimeoutExpired as error:
            # bytes although text was asked for
            printed, ended = error.output.decode(errors="replace") if error.output else "", "time limit"
        print(printed[-20_000:], flush=True)
        counted = summary(printed)
        whole = f"{len(SHAPES) * 4 * 6} calls" in printed
        row = {"tool": tool, "seconds": round(time.monotonic() - began, 1), "ended": ended, "all_calls_made": whole}
        row |= {"errors": None, "summary": None} if counted is None else {"errors": counted[0], "summary": counted[1]}
        record(STEP, row)
        clean = counted is not None and counted[0] == 0 and whole
        bad |= not clean
        said.append(f"{tool}: {'no summary, ' + ended if counted is None else f'{counted[0]} errors'}")
        headline(STEP, ", ".join(said))
    if bad:
        raise SystemExit(f"Error: {', '.join(said)}")


if __name__ == "__main__":
    small()
    main()
