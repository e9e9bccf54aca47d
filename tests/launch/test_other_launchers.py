"""The command lines of DeepSpeed's and torch's own launchers, beside ours: each trains (minutes)."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def head(name: str, folder: Path) -> list[str]:
    if name == "torchrun":
        return [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", free_port(), "--module", "launch"]
    words = [str(BIN / "deepspeed"), "--master_port", free_port()]
    if name == "deepspeed --hostfile":
        (folder / "hosts").write_text("localhost slots=2\n")
        words += ["--hostfile", str(folder / "hosts"), "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1"]
    else:
        words += ["--num_gpus", "2"]
    return [*words, "--module", "launch"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "deepspeed", "deepspeed --hostfile"])
def test_other_launchers_start_the_ranks_of_a_run(tiny_run: Callable[..., Path], tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    config = tiny_run("schedule.steps=2", "checkpoint.every_steps=2")
    command = [*head(name, tmp_path), "pretrain", str(config), "--output", str(run)]
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(e["kind"], e.get("ranks")) for e in events if e["kind"] in ("start", "done")] == [
        ("start", 2),
        ("done", None),
    ]
