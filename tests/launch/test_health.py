"""The health of all nodes: who is slow, who differs, and the gate before a job."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.health import CLOCKS_APART, Reading, findings, leave_word

ROOT = Path(__file__).resolve().parents[2]
GOOD = Reading(0, "n1", "H100 0", 600.0, 1500.0, 50.0, 200.0, 40.0, 80 << 30, 64 << 30, 500 << 30, 0.0, "torch 2.14")


def fleet(**of_rank_5: object) -> list[Reading]:
    """Eight ranks on n1 to n4, of which rank 5, on n3, differs."""
    ranks = [replace(GOOD, rank=rank, node=f"n{rank // 2 + 1}", device=f"H100 {rank % 2}") for rank in range(8)]
    ranks[5] = replace(ranks[5], **of_rank_5)  # type: ignore[arg-type]
    return ranks


def test_equal_nodes_have_no_findings() -> None:
    assert findings(fleet()) == {} and findings([]) == {}


def test_processors_that_others_use_too_are_not_compared() -> None:
    slow = [replace(one, device="cpu") for one in fleet(tflops=1.0, inside=1.0)]
    assert findings(slow) == {}


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ({"tflops": 400.0}, "matrix products at 400 TFLOP/s, the median is 600"),
        ({"copy": 900.0}, "copies on the device at 900 GB/s"),
        ({"upload": 11.0}, "copies to the device at 11 GB/s, the median is 50"),
        ({"inside": 90.0}, "all-reduce inside the node at 90 GB/s, the median is 200"),
        ({"problem": "the device fails: CUDA error: uncorrectable ECC"}, "uncorrectable ECC"),
        ({"shared": 64 << 20}, "/dev/shm has 0.1 GiB free"),
        ({"disk": 1 << 30}, "the temporary folder has 1.0 GiB free"),
        ({"clock": -(CLOCKS_APART + 1)}, "its clock is -3.0 s apart from rank 0's"),
        ({"versions": "torch 2.13"}, "other versions: torch 2.13; the others have torch 2.14"),
    ],
)
def test_the_node_that_is_slow_or_differs_is_named(difference: dict[str, object], words: str) -> None:
    found = findings(fleet(**difference))
    assert list(found) == ["n3"] and found["n3"][0].startswith("rank 5 (H100 1): ") and words in found["n3"][0]


def test_the_gate_lets_the_fit_nodes_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word = str(tmp_path / "word")
    readings = fleet(tflops=100.0)
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    assert not leave_word(readings, word)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert leave_word(readings, word)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["word.fit.n1", "word.unfit.n3"]
    assert "n3: rank 5 (H100 1): matrix products" in (tmp_path / "word.unfit.n3").read_text()


def test_two_real_ranks_are_measured_under_the_launcher() -> None:
    words = ["launch", "local", "--processes", "2", "doctor", "--distributed", "--json"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "launch", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    # 1, and said, where this machine's own disk or shared memory is small.
    assert ended.returncode in (0, 1), ended.stderr[-2000:]
    result = json.loads(ended.stdout)
    assert [one["rank"] for one in result["ranks"]] == [0, 1]
    assert all(one["tflops"] > 0 and one["copy"] > 0 and one["inside"] > 0 for one in result["ranks"])
    assert all(one["between"] is None and abs(one["clock"]) < 2 for one in result["ranks"])
    assert bool(result["findings"]) == bool(ended.returncode)
