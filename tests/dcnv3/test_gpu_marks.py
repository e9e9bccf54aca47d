"""`-m gpu` selects every test that touches a GPU, and no other: as far as collecting on a machine without one shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ["test_golden.py", "test_gradients.py", "test_registration.py", "test_arguments.py", "test_packed.py"]
COLLECT = """
import json, sys, types, torch, pytest
torch.cuda.is_available = lambda: True
sys.modules["dcnv3._C_cuda"] = types.ModuleType("dcnv3._C_cuda")
class Tell:
    def pytest_collection_finish(self, session):
        rows = [(item.name, item.get_closest_marker("gpu") is not None) for item in session.items]
        print("ROWS" + json.dumps(rows))
sys.exit(pytest.main(["--collect-only", "-qq", "-m", "", *sys.argv[1:]], plugins=[Tell()]))
"""


@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_every_test_of_a_gpu_is_marked_and_no_other(kernels: str) -> None:
    if kernels == "triton":
        pytest.importorskip("triton")
    environment = os.environ | {"DCNV3_TEST_TRITON": str(int(kernels == "triton")), "CC": "cc"}
    command = [sys.executable, "-c", COLLECT, *(str(HERE / name) for name in FILES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ROWS")), None)
    assert line is not None, done.stdout + done.stderr
    rows = json.loads(line.removeprefix("ROWS"))
    for name, marked in rows:
        words = name.partition("[")[2].rstrip("]").split("-")
        assert marked == (not {"cuda", "triton"}.isdisjoint(words) or "any_device_index" in name), name
    names = {name for name, marked in rows if marked}
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        for channels in (5, 8, 16, 32, 64, 80):
            every = "test_every_type_and_channel_count_equals_the_float64_definition"
            assert f"{every}[{kernels}-torch.{dtype}-{channels}]" in names
        assert any(f"{kernels}-torch.{dtype}" in name for name in names if "deterministic" in name)
    golden = [name for name in names if "those_of_the_public_code" in name and f"{kernels}-on-cuda" in name]
    assert len(golden) == 10
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        for center in ("plain", "centre"):
            assert sum(f"{kernels}-" in n and f"{center}-torch.{dtype}" in n for n in names if "its_parts" in n) == 5
    assert any("any_shape" in name for name in names) and any("opcheck" in name for name in names)
    other = {"cuda": "triton", "triton": "cuda-on"}[kernels]
    assert not any(other in name for name in names)
