"""Nsight Compute's counters of the kernels at two stages, bf16: rows of the results, and OUT/ncu.csv whole.

Run with --calls it makes the calls that are profiled; else it runs itself so under `ncu`. Clocks are left as they are.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from cases import Case
from record import OUT, headline, not_here, record, small

STEP = "counters"
CASES = [Case("T", 1, "bfloat16", 64), Case("H", 3, "bfloat16", 32)]
SECTIONS = [
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
    "Occupancy",
    "LaunchStats",
    "WarpStateStats",
    "SchedulerStats",
    "InstructionStats",
]
# recorded under these names; the rest stands in the file
COUNTERS = {
    "ns": "gpu__time_duration.sum",
    "registers": "launch__registers_per_thread",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "occupancy_possible_percent": "sm__maximum_warps_per_active_cycle_pct",
    "instructions": "smsp__inst_executed.sum",
    "issue_percent": "smsp__issue_active.avg.pct",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory_percent": "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_percent": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_hit_percent": "l1tex__t_sector_hit_rate.pct",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "dram_bytes_read": "dram__bytes_read.sum",
    "dram_bytes_written": "dram__bytes_write.sum",
    "l2_sectors_red": "lts__t_sectors_op_red.sum",
    "l2_sectors_red_a_second": "lts__t_sectors_op_red.sum.per_second",
    "l2_sectors_read": "lts__t_sectors_op_read.sum",
    "l1_red_instructions": "smsp__inst_executed_op_global_red.sum",
}
ASKED = [name for name in COUNTERS.values() if name.startswith(("dram__", "lts__t_", "l1tex__t_"))]
STALL = "smsp__average_warps_issue_stalled_"


def calls() -> None:
    """One forward and one backward of each case."""
    import dcnv3  # noqa: F401  # registers the operators

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in [Case("T", 4, "bfloat16", 1)] if device.type == "cpu" else CASES:
        i = case.inputs(device)
        torch.ops.dcnv3.forward(i.value, i.offset, i.mask, *case.geometry)
        torch.ops.dcnv3.backward(i.gradient, i.value, i.offset, i.mask, *case.geometry, False)
    if device.type == "cuda":
        torch.cuda.synchronize()


def profile(report: Path, asked: list[str], limit: float) -> str:
    """Run the calls under ncu; what it printed. TimeoutExpired after `limit` seconds."""
    command = ["ncu", "--clock-control", "none", "-f", "-o", str(report)]
    command += ["--kernel-name", "regex:^(forward|backward|tile)_kernel$"]
    for section in SECTIONS:
        command += ["--section", section]
    if asked:
        command += ["--metrics", ",".join(asked)]
    command += [sys.executable, __file__, "--calls"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
    print(done.stdout[-8000:], flush=True)
    return done.stdout


def rows(text: str) -> list[dict[str, str]]:
    """The kernels of ncu's raw csv page: a line of names, one of units, one a kernel; other lines begin with ==."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(io.StringIO("\n".join(lines))))
    if len(table) < 3:
        return []
    return [dict(zip(table[0], line, strict=False)) for line in table[2:]]


def number(text: str) -> float | str:
    """A cell's number, with its thousands' commas; the text where it is none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def chosen(kernel: dict[str, str]) -> dict[str, Any]:
    """The counters that are recorded, and the three longest stalls."""
    row: dict[str, Any] = {"kernel": kernel.get("Kernel Name", "")[:80]}
    row |= {name: number(kernel[its]) for name, its in COUNTERS.items() if kernel.get(its)}
    stalls = {name.removeprefix(STALL): number(text) for name, text in kernel.items() if name.startswith(STALL)}
    counted = {name: its for name, its in stalls.items() if isinstance(its, float) and "not_issued" not in name}
    longest = sorted(counted, key=lambda name: -counted[name])[:4]
    row["stalls_warps_an_issue"] = {name.partition("_per_issue")[0]: round(counted[name], 3) for name in longest}
    return row


def main() -> None:
    if "--calls" in sys.argv:
        calls()
        return
    if not torch.cuda.is_available():
        calls()
        not_here(STEP, "no CUDA device")
    if shutil.which("ncu") is None:
        not_here(STEP, "no ncu")
    report = Path(tempfile.mkdtemp(prefix="ncu-")) / "report"
    printed = profile(report, ASKED, 35)
    if "ERR_NVGPUCTRPERM" in printed:
        not_here(STEP, "no permission to read the GPU's counters")
    found = report.with_suffix(".ncu-rep")
    if not found.exists():  # a counter that this ncu does not know ends it
        profile(report, [], 20)
    page = ["ncu", "--import", str(found), "--page", "raw", "--csv", "--print-units", "base"]
    text = subprocess.run(page, capture_output=True, text=True, timeout=30, check=True).stdout
    out = os.environ.get(OUT)
    if out:
        Path(out).with_name("ncu.csv").write_text(text)
    kernels = rows(text)
    said: list[str] = []
    passed = -1  # a case begins with its forward kernel; its backward has one kernel or, with tiles, two
    for kernel in kernels:
        passed += "forward" in kernel.get("Kernel Name", "")
        row = CASES[min(passed, len(CASES) - 1)].about() | chosen(kernel)
        record(STEP, row)
        time = row.get("ns")
        said.append(
            f"{row['model']}{row['stage']} {row['kernel'].partition('_')[0]} "
            f"{time / 1e6 if isinstance(time, float) else float('nan'):.3f} ms"
        )
    headline(STEP, ", ".join(said))
    if len(kernels) < 2 * len(CASES):
        raise SystemExit(f"Error: {len(kernels)} kernels of {2 * len(CASES)} were profiled")


if __name__ == "__main__":
    small()
    main()
