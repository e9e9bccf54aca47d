"""What this machine has, asked without importing torch: GPUs, cores that we may use, memory."""

import os
import shutil
import subprocess
from pathlib import Path


def visible_gpus() -> int:
    """NVIDIA GPUs that a process started here will see. CUDA_VISIBLE_DEVICES decides where it is set."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(gpu_names())
    if chosen is None:
        return present
    count = 0
    for entry in (part.strip() for part in chosen.split(",")):
        if not entry or entry.startswith("-"):
            break  # as CUDA does: an invalid entry hides itself and all that follow
        count += 1
    return min(count, present)


def gpu_names() -> list[str]:
    """One name a GPU that the driver shows here, in the driver's order. Empty without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ["NVIDIA GPU" for _ in Path("/dev").glob("nvidia[0-9]*")]
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return []
    return [line.strip() for line in answer.splitlines() if line.strip()]


def usable_cores() -> int:
    """Cores of our affinity mask, fewer where a cgroup's quota is smaller."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def memory_bytes() -> int:
    """Memory that we may use: the machine's, or the cgroup's limit where that is smaller."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return total if limit == "max" else min(total, int(limit))
    except (OSError, ValueError):
        return total


def resolve_processes(wanted: str) -> int:
    """`auto` (every GPU, or one process on the CPU) or a number, as given to --processes."""
    from data_pipeline.errors import UserError

    if wanted == "auto":
        return max(1, visible_gpus())
    if not wanted.isdigit() or int(wanted) < 1:
        raise UserError(f"--processes is {wanted!r}: expected `auto` or a number of at least 1")
    return int(wanted)
