"""The GPU benchmark: its arithmetic here, a tiny run of it where there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dcnv3 import available_backends


@pytest.fixture
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("operator_gpu")


def test_a_floor_moves_every_tensor_once(benchmark: ModuleType) -> None:
    value, offset, mask = (torch.empty(2, 3, 4, width, dtype=torch.float16) for width in (16, 36, 18))
    pixel = 2 * 3 * 4 * 2
    forward = pixel * (16 + 36 + 18 + 16)
    backward = pixel * (
        16 + 36 + 18 + 16 + 16 + 36 + 18
    )  # the inputs and the output's gradient in, three gradients out
    moved = benchmark.bytes_moved(value, offset, mask)
    assert moved == {"forward": forward, "backward": backward, "forward_backward": forward + backward}


def test_a_turn_is_as_many_calls_as_fill_it(benchmark: ModuleType) -> None:
    calls = benchmark.calls_for
    assert [calls(one) for one in (0.05, 1.0, 50.0, 0.0)] == [200, 10, 1, 1000]


def test_deform_conv2d_is_called_so_that_it_computes_the_same(benchmark: ModuleType, make_call: Any) -> None:
    pytest.importorskip("torchvision")
    call = make_call(group_channels=8)
    output = benchmark.by_deform_conv2d(call.value, call.offset, call.mask, 2)
    torch.testing.assert_close(output.double(), call.run("reference")["output"], atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(available_backends()["cuda"] is not None, reason="no CUDA kernels that can run here")
def test_a_tiny_run_gives_every_pass_a_share_of_the_bandwidth(benchmark: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, str(benchmark.__file__), "--models", "T", "--sizes", "224"]
    command += ["--dtypes", "float32", "--batch", "2"]
    subprocess.run([*command, "--rounds", "3", "--output", str(tmp_path / "out.json")], check=True, timeout=300)
    for row in json.loads((tmp_path / "out.json").read_text())["rows"]:
        for name in ("forward", "forward_backward"):
            assert row[name]["ours_timed"] == "graph" and row[name]["share_of_copy_bandwidth"] > 0
        assert row["backward"]["ours_ms"] > 0
