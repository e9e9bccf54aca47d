"""The plan's bytes of a rank against the live tensors of real DeepSpeed ranks (minutes)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.planning import count
from pretrain.analysis import plan
from pretrain.configuration import load_config

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
# Wide where it costs no time: the text tower's vocabulary and the decoder make parameters outweigh everything else.
WIDE = (
    "model.overrides.clip_embed_dim=256",
    "task.embed_dim=256",
    "task.decoder.dim=256",
    "task.decoder.layers=4",
    "task.text.width=256",
    "schedule.steps=3",
    "training.batch_size=4",
    "checkpoint.asynchronous=false",
)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", plan.STAGES)
def test_a_rank_holds_what_the_plan_says(tiny_run: Callable[..., Path], stage: int, precision: str) -> None:
    config = tiny_run(*WIDE, f"training.zero_stage={stage}", f"training.precision={precision}")
    script = Path(__file__).with_name("weigh_states.py")
    words = ["launch", "local", "--processes", str(RANKS), sys.executable, str(script), str(config), "run"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words], cwd=config.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = count(load_config(str(config)), 0).sizes
    planned = plan.rank_memory(sizes, stage=stage, ranks=RANKS, precision=precision, reduction_bytes=4.0)
    for rank in range(RANKS):
        measured = json.loads((config.parent / "run" / f"weights-{rank}.json").read_text())
        assert measured["before"][-1] == pytest.approx(planned.states + planned.standing, rel=0.1)
        peak = max(measured["in"][-len(measured["in"]) // 3 :])
        print("MOMENTS", stage, precision, measured["before"][-1], peak, planned)
        assert peak == pytest.approx(planned.states + planned.standing + planned.update, rel=0.1)
