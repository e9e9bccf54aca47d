"""The real task over the real reader, two ranks: stage, recomputation and compiling change no loss; its FLOPs are the
plan's.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from training_fakes import logs, metrics, run_ranks

from launch.planning import count
from pretrain.configuration import load_config

VARIANTS = [
    (stage, recompute, compiled) for stage in (0, 3) for recompute in (False, True) for compiled in (False, True)
]


@pytest.mark.slow
def test_stage_recomputation_and_compiling_change_no_loss(
    tiny_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tiny_run("schedule.steps=6", "training.log_every=1", "checkpoint.every_steps=null"))
    work = {
        tmp_path / f"{stage}-{recompute}-{compiled}": load_config(
            path,
            [
                f"training.zero_stage={stage}",
                f"model.activation_checkpointing={str(recompute).lower()}",
                f"model.compile={str(compiled).lower()}",
            ],
        )
        for stage, recompute, compiled in VARIANTS
    }
    script = str(Path(__file__).with_name("real_rank.py"))
    assert run_ranks(work, tmp_path / "all", 2, 500, script=script, FAKE_COMPILER="aot_eager") == [0, 0], logs(
        tmp_path / "all"
    )[-3000:]
    first, *others = [[row["loss"] for row in metrics(output)] for output in work]
    assert len(first) == 6 and len(set(first)) == 6
    for other in others:
        assert other == pytest.approx(first, abs=1e-5)
    monkeypatch.setattr("pretrain.models.counting.SAMPLING_COST", 0)  # which the counter of a run does not see
    planned = count(load_config(path), 0).flops_per_sample
    for output in work:
        row = metrics(output)[-1]
        assert row["tflops_per_rank"] * 1e12 * 2 / row["images_per_second"] == pytest.approx(planned, rel=0.05)
