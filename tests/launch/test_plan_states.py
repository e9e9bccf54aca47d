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
from pretrain.configuration import dump_config, load_config

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


def weigh(config: Path) -> list[dict[str, list[int]]]:
    """Live bytes of every rank, before each update and at its moments."""
    script = Path(__file__).with_name("weigh_states.py")
    words = ["launch", "local", "--processes", str(RANKS), sys.executable, str(script), str(config), "run"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words], cwd=config.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((config.parent / "run" / f"weights-{rank}.json").read_text()) for rank in range(RANKS)]


def assert_as_planned(config: Path, stage: int, precision: str, classes: int = 0) -> None:
    sizes = count(load_config(str(config)), classes).sizes
    planned = plan.rank_memory(sizes, stage=stage, ranks=RANKS, precision=precision, reduction_bytes=4.0)
    for measured in weigh(config):
        last = measured["in"][-len(measured["in"]) // 3 :]  # of the moments of three steps
        assert measured["before"][-1] == pytest.approx(planned.states + planned.standing, rel=0.1)
        assert max(last) == pytest.approx(planned.states + planned.standing + planned.update, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", plan.STAGES)
def test_a_rank_holds_what_the_plan_says(tiny_run: Callable[..., Path], stage: int, precision: str) -> None:
    config = tiny_run(*WIDE, f"training.zero_stage={stage}", f"training.precision={precision}")
    assert_as_planned(config, stage, precision)


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["internimage_t", "internimage_b"])
def test_a_rank_of_a_whole_variant_holds_what_the_plan_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("finetuning", "evaluation"):
        monkeypatch.syspath_prepend(str(ROOT / "tests" / folder))
    from evaluation_shapes import write_set
    from finetuning_configurations import tiny_configuration

    whole = {"model__name": name, "model__overrides": {}, "model__num_classes": 1000, "data__image_size": 64}
    changes = whole | {"training__batch_size": 4, "training__precision": "bf16", "training__zero_stage": 2}
    run = tiny_configuration(write_set(tmp_path / "shapes", name="shapes"), "supervised", 3, **changes)
    (tmp_path / "c.yaml").write_text(dump_config(run))
    assert_as_planned(tmp_path / "c.yaml", 2, "bf16", classes=1000)
