"""Where and of which code a result was measured: one record for every benchmark, under `machine` in its file."""

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def machine(*packages: str, device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge a figure: hardware, versions, code, date, and how busy the machine was.

    Call it before the first measurement, in the process that measures, after torch.set_num_threads: the load average
    (of the last minute) is then other work's, and commit and changes are those of the code that runs. Add what only
    one benchmark knows with `|`. Only the standard library and torch are needed.

    packages: distributions whose versions matter beside torch's, each recorded under its name; one that is not
        installed raises importlib.metadata.PackageNotFoundError.
    device: what the benchmark runs on, as torch spells it; a GPU is recorded by its name, which initialises CUDA in
        this process.

    `commit` and `uncommitted_changes` (of tracked files; results are outputs and do not count) are None where the code
    lies in no git checkout, or git is not installed.
    """
    import torch  # here, since processes that a benchmark spawns import its imports, and may be weighed

    commit, changed = code(HERE)
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 2),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit,
        "uncommitted_changes": changed,
        "date": time.strftime("%Y-%m-%d"),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def processor() -> str:
    """Its name with family and model, since cloud machines call several generations the same."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def code(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, whether a tracked file outside benchmarks/results differs from it) of the checkout around `folder`."""
    commit = _git(folder, "rev-parse", "HEAD")
    paths = [":/", ":(top,exclude)benchmarks/results"]
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *paths)
    return commit, None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
