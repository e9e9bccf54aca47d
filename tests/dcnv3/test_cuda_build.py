"""What the compiler makes of the CUDA kernels is no worse than recorded: spills, occupancy, accesses, loops."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def resources(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("operator_resources")


def test_the_record_is_of_the_kernels_that_are_here(resources: ModuleType) -> None:
    """After a change of the kernels run `python benchmarks/operator_resources.py` (nvcc): it shows what that costs."""
    recorded = json.loads(resources.RESULTS.read_text())
    assert recorded["sources"] == resources.digest()
    assert recorded["nvcc"] and len(recorded["machine"]["commit"]) == 40 and recorded["machine"]["system"]


def test_a_comment_is_no_change_of_the_code(
    resources: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(resources.CSRC, copy)
    monkeypatch.setattr(resources, "CSRC", copy)
    monkeypatch.setattr(resources, "SOURCES", copy / "cuda")
    before = resources.digest()
    file = copy / "cuda" / "forward.cuh"
    file.write_text(file.read_text() + "\n// more words\n\n")
    assert resources.digest() == before
    for name in ("cuda/forward.cuh", "sampling.h"):
        (copy / name).write_text((copy / name).read_text() + "int more;\n")
        assert resources.digest() != before
        before = resources.digest()


def test_the_record_is_of_kernels_that_do_not_spill_and_load_128_bits(resources: ModuleType) -> None:
    recorded = json.loads(resources.RESULTS.read_text())["kernels"]
    assert set(recorded) == {"sm_80", "sm_90", "sm_100"}
    for architecture, kernels in recorded.items():
        assert len(kernels) == 54 + 32, architecture
        for kernel, numbers in kernels.items():
            if kernel.startswith("tiles"):
                assert numbers["spill_bytes"] == 0 or "deterministic" in kernel, (architecture, kernel)
                assert numbers["launches"]["any channels"]["occupancy_percent"] >= (
                    7 if architecture == "sm_80" else 12
                )
                continue
            if kernel.startswith("norm"):
                assert numbers["spill_bytes"] == 0, (architecture, kernel)
                # backward, seven loads are of the sums, whatever the rows are
                least = 11 if "backward" in kernel else 4
                assert " x1" in kernel or numbers["loads"]["128"] >= least, (architecture, kernel)
                assert numbers["launches"]["320 channels"]["occupancy_percent"] >= 25, (architecture, kernel)
                continue
            assert numbers["spill_bytes"] == 0, (architecture, kernel)
            if " x1" not in kernel:
                assert numbers["loads"]["128"] >= 4, (architecture, kernel)
                assert not kernel.startswith("forward") or numbers["stores"] == {"128": 1}, (architecture, kernel)
            for launch in numbers["launches"].values():
                assert launch["occupancy_percent"] >= 25, (architecture, kernel)
    for dtype in ("float32 x4", "bfloat16 x8", "float16 x8"):
        for architecture, only in itertools.product(("sm_90", "sm_100"), ("", " of 16", " of 32")):
            assert set(recorded[architecture][f"backward {dtype}{only}"]["atomics"]) == {"128"}
    for architecture in recorded:
        for channels in (16, 32):
            names = (f"{direction} bfloat16 x8 of {channels}" for direction in ("forward", "backward"))
            forward, backward = (recorded[architecture][name]["point_loop"] for name in names)
            assert forward["points"] == 3 and forward["instructions"] <= 230, architecture
            assert backward["points"] == 1 and backward["instructions"] <= (310 if architecture == "sm_80" else 190)


def test_the_forward_loop_has_code_for_the_points_left_over(resources: ModuleType) -> None:
    """Four loads a point: a round of the loop has three points, or two, and then one more for an odd number of them.

    One load is the centre's.
    """
    recorded = json.loads(resources.RESULTS.read_text())["kernels"]
    for architecture, kernels in recorded.items():
        for kernel, numbers in kernels.items():
            if kernel.startswith("forward") and " x1" not in kernel:
                together = numbers["point_loop"]["points"]
                assert together == (3 if " of " in kernel else 2), (architecture, kernel)
                assert numbers["loads"]["128"] == 4 * 3 + 1, (architecture, kernel)


ODD_UNROLL = """
__global__ void kernel(const float* x, float* y, int chunk, int points) {
  float sum = 0;
  for (int begin = 0; begin < points; begin += chunk) {
    const int count = min(chunk, points - begin);
#pragma unroll %d
    for (int k = 0; k < count; ++k) sum += x[k];
  }
  *y = sum;
}
"""


def test_no_loop_of_the_kernels_asks_for_an_odd_unroll_factor(resources: ModuleType, tmp_path: Path) -> None:
    """nvcc 13.0 leaves the remainder out of such a loop where its count is only known at run time (ODD_UNROLL)."""
    for path in sorted(resources.SOURCES.iterdir()):
        for factor in re.findall(r"#pragma unroll(.*)", path.read_text()):
            assert {int(number) for number in re.findall(r"\d+", factor)} <= {1, 2, 4, 8}, (path.name, factor)
    nvcc = resources.find("nvcc")
    if nvcc is None or resources.nvcc_version() != "13.0.88":
        return
    loads = {}
    for factor in (2, 3, 4, 5):
        source = tmp_path / f"unroll_{factor}.cu"
        source.write_text(ODD_UNROLL % factor)
        subprocess.run([nvcc, "-arch=sm_90", "-ptx", str(source), "-o", f"{source}.ptx"], check=True, timeout=60)
        loads[factor] = Path(f"{source}.ptx").read_text().count("ld.global.f32")
    assert loads[2] > 2 and loads[4] > 4  # a round of the loop, and the remainder
    assert loads[3] == 3 and loads[5] == 5  # no remainder: this rule is needed


def test_the_loop_over_the_points_is_found_in_a_disassembly(resources: ModuleType) -> None:
    """The innermost loop that reads the table and four times global memory, which an outer loop contains."""
    body = ["LDS.128 R4", "NOP", *["LDG.E.128 R8"] * 8, "FFMA R1", "@P0 BRA 0x10"]
    texts = ["LDG.E R0", *body, "@P1 BRA 0x0", "BRA 0xf0"]
    listing = "Function : one\n" + "\n".join(f"   /*{16 * i:04x}*/  {text} ;" for i, text in enumerate(texts))
    (code,) = resources.functions(listing).values()
    assert resources.point_loop(code) == {"instructions": 12, "points": 2}


def test_a_worse_kernel_is_told_of(resources: ModuleType) -> None:
    def kernel(spilled: int, percent: int, loads: dict[str, int], stores: dict[str, int]) -> dict[str, Any]:
        launches = {"16 channels": {"occupancy_percent": percent}}
        return {"k": {"spill_bytes": spilled, "launches": launches, "loads": loads, "stores": stores}}

    old = kernel(0, 50, {"128": 12, "32": 2}, {"128": 1})
    longer = {"k": old["k"] | {"point_loop": {"instructions": 260, "points": 3}}}
    shorter = {"k": old["k"] | {"point_loop": {"instructions": 80, "points": 1}}}
    assert resources.worse(longer, shorter) == ["k: 87 instructions a point, 80 recorded"]
    assert resources.worse(shorter, longer) == []
    assert resources.worse(old, old) == []
    better = kernel(0, 62, {"128": 14, "32": 1}, {"128": 1})
    assert resources.worse(better, old) == []
    for worse, words in (
        (kernel(8, 50, {"128": 12, "32": 2}, {"128": 1}), "k: 8 bytes spilled, 0 recorded"),
        (kernel(0, 37, {"128": 12, "32": 2}, {"128": 1}), "k, 16 channels: occupancy 37 %, 50 recorded"),
        (kernel(0, 50, {"128": 11, "32": 2}, {"128": 1}), "k: 11 loads of 128 bits, 12 recorded"),
        (kernel(0, 50, {"128": 12, "32": 2, "16": 1}, {"128": 1}), "k: 3 loads of less than 128 bits, 2 recorded"),
        (kernel(0, 50, {"128": 12, "32": 2}, {}), "k: 0 stores of 128 bits, 1 recorded"),
    ):
        assert resources.worse(worse, old) == [words]
    assert resources.worse({}, old) == ["k: no longer there"]


@pytest.mark.parametrize(
    ("architecture", "registers", "warps", "shared", "percent"),
    [
        (80, 32, 8, 0, 100),
        (80, 64, 8, 1024, 50),  # 65536 / (64 * 32) = 32 warps
        (80, 72, 8, 1024, 37),  # 28 warps, so three blocks of eight
        (80, 72, 4, 1024, 43),  # and seven of four
        (80, 32, 8, 40 << 10, 50),  # 164 KiB hold four blocks of 41
        (90, 32, 8, 40 << 10, 62),  # 228 KiB hold five
        (90, 32, 1, 0, 50),  # 32 blocks
    ],
)
def test_occupancy_is_bounded_by_registers_shared_memory_and_blocks(
    resources: ModuleType, architecture: int, registers: int, warps: int, shared: int, percent: int
) -> None:
    assert resources.occupancy(architecture, registers, warps, shared) == percent


@pytest.mark.slow
def test_the_kernels_compile_to_no_worse_than_recorded(resources: ModuleType) -> None:
    """Takes a minute of a core. Other compilers than the recorded one count otherwise."""
    if resources.find("nvcc") is None:
        pytest.skip("no nvcc: the CUDA kernels are not compiled here")
    if resources.nvcc_version() != json.loads(resources.RESULTS.read_text())["nvcc"]:
        pytest.skip("the record is of another nvcc: record again to compare")
    done = subprocess.run(
        [sys.executable, str(resources.__file__), "--check"], capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
