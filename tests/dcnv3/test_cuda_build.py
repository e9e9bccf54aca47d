"""What the compiler makes of the CUDA kernels is no worse than recorded: spills, occupancy, 128-bit accesses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "operator_resources.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("operator_resources", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_record_is_of_kernels_that_do_not_spill_and_load_128_bits() -> None:
    recorded = json.loads(load().RESULTS.read_text())["kernels"]
    assert set(recorded) == {"sm_80", "sm_90"}
    for architecture, kernels in recorded.items():
        assert len(kernels) == 24, architecture
        for kernel, numbers in kernels.items():
            assert numbers["spill_bytes"] == 0, (architecture, kernel)
            if " x1" not in kernel:
                assert numbers["loads"]["128"] >= 4, (architecture, kernel)
    for dtype in ("float32 x4", "bfloat16 x8", "float16 x8"):
        assert recorded["sm_90"][f"backward {dtype}"]["atomics"]["128"] >= 4


def test_a_worse_kernel_is_told_of() -> None:
    old = {"forward float32 x4": {"spill_bytes": 0, "occupancy_percent": 50, "loads": {"128": 12}}}
    worse = {"forward float32 x4": {"spill_bytes": 8, "occupancy_percent": 25, "loads": {"32": 48}}}
    assert load().worse(old, old) == []
    assert len(load().worse(worse, old)) == 3
    assert load().worse({}, old) == ["forward float32 x4: no longer there"]


@pytest.mark.slow
def test_the_kernels_compile_to_no_worse_than_recorded() -> None:
    if load().find("nvcc") is None:
        pytest.skip("no nvcc: the CUDA kernels are not compiled here")
    done = subprocess.run([sys.executable, str(BENCHMARK), "--check"], capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
