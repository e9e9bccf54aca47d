"""The real task over the real reader, two ranks: stage, recomputation and compiling change no loss; its FLOPs are the
plan's.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from training_fakes import logs, metrics, run_ranks

from launch.cli import run
from launch.planning import count
from pretrain.configuration import load_config

BUDGET = "{budget_gb: 0.003}"  # recomputes part of the blocks
VARIANTS = [(0, "none", "false"), (0, BUDGET, "false"), (0, "blocks", "true")]
VARIANTS += [(3, recompute, compiled) for recompute in ("none", "blocks", BUDGET) for compiled in ("false", "true")]


@pytest.mark.slow
def test_stage_recomputation_and_compiling_change_no_loss(
    tiny_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("model.overrides.drop_path_rate=0.2", "model.overrides.layer_scale=0.1")
    path = str(tiny_run("schedule.steps=6", "training.log_every=1", "checkpoint.every_steps=null", *model))
    work = {
        tmp_path / f"{stage}-{recompute[:6]}-{compiled}": load_config(
            path,
            [f"training.zero_stage={stage}", f"model.recompute={recompute}", f"model.compile={compiled}"],
        )
        for stage, recompute, compiled in VARIANTS
    }
    script = str(Path(__file__).with_name("real_rank.py"))
    ended = run_ranks(work, tmp_path / "all", 2, 500, script=script, FAKE_COMPILER="aot_eager")
    assert ended == [0, 0], logs(tmp_path / "all")[-3000:]
    first, *others = [[row["loss"] for row in metrics(output)] for output in work]
    assert len(first) == 6 and len(set(first)) == 6
    for other in others:
        assert other == pytest.approx(first, abs=1e-5)
    monkeypatch.setattr("pretrain.models.counting.SAMPLING_COST", 0)  # which the counter of a run does not see
    planned = count(load_config(path), 0).flops_per_sample
    for output in work:
        row = metrics(output)[-1]
        assert row["tflops_per_rank"] * 1e12 * 2 / row["images_per_second"] == pytest.approx(planned, rel=0.05)


def test_what_the_backward_pass_finds_is_logged(tiny_run: Callable[..., Path], tmp_path: Path) -> None:
    path = str(tiny_run("task.balance=0.25", "schedule.steps=2", "training.log_every=2", "checkpoint.every_steps=null"))
    assert run(["pretrain", path, "--output", str(tmp_path / "run"), "--processes", "1"]) == 0
    (row,) = metrics(tmp_path / "run")
    for name in ("intra", "inter"):
        assert row[f"grad_norm/{name}"] > 0 and row[f"balance/{name}"] > 0
    assert row["grad_norm/text"] > 0 and row["grad_norm/pooled"] > 0
