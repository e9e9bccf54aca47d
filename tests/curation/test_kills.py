"""A command that is killed at any instant, and run again, leaves what an unbroken run leaves, byte for byte."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from curation_sets import encoded, photo

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("operation", ["filter", "dedup", "takedown", "merge", "split"])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_change_nothing(make_set: Callable[..., Path], tmp_path: Path, operation: str, kills: int) -> None:
    work = tmp_path / "work"
    (work / "start").mkdir(parents=True)
    sizes = [(96, 80), (64, 60), (120, 100)]
    for name, numbers in (("web", range(24)), ("more", range(18, 34)), ("held", range(8))):
        blends = [encoded(photo(n // 2 if n % 4 else n, sizes[n % 3])) for n in numbers]
        make_set(name, blends, rows_per_shard=4).rename(work / "start" / name)
    command = [sys.executable, str(Path(__file__).with_name("kill_runs.py")), str(work), operation, str(kills), "7"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and done.stdout.startswith("sound"), done.stderr
    assert int(done.stdout.split()[1]) >= kills
