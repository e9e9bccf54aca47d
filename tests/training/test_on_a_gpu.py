"""One rank on one GPU: the proofs of the other files that do not need a CPU's exact bits. A rank too many is told."""

from pathlib import Path

import pytest
import torch
from test_equals_plain_loop import config_of, plain
from training_fakes import configuration, logs, metrics, run_ranks

from data_pipeline.errors import UserError
from pretrain.training.checkpoint.disk import find_checkpoint, load_weights
from pretrain.training.distributed import join

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_curve_and_the_average_on_a_gpu_are_a_plain_loops_on_a_cpu(tmp_path: Path, accumulation: int) -> None:
    work = {
        tmp_path / f"{stage}-{recompute}": config_of(stage, accumulation, recompute)
        for stage in (0, 1, 2, 3)
        for recompute in (False, True)
    }
    assert run_ranks(work, tmp_path / "all", 1) == [0], logs(tmp_path / "all")[-3000:]
    losses, _, weights, average = plain(accumulation)
    for output in work:
        assert [row["loss"] for row in metrics(output)] == pytest.approx(losses, abs=1e-4)
        for which, expected in (("model", weights), ("ema", average)):
            found = load_weights(output, which)[0]
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_half_precision_on_a_gpu_is_stopped_and_resumed(tmp_path: Path, stage: int, precision: str) -> None:
    output = tmp_path / "run"
    same = {"training__zero_stage": stage, "training__precision": precision, "schedule__steps": 12}
    assert run_ranks(configuration(training__stop_after=7, **same), output, 1) == [75], logs(output)[-3000:]
    before = find_checkpoint(output).state
    assert ("cur_scale" in before["scaler"]) == (precision == "fp16")
    assert run_ranks(configuration(**same), output, 1) == [0], logs(output)[-3000:]
    rows = metrics(output)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert find_checkpoint(output).state["scaler"].get("cur_iter", 12) == 12
    assert rows[-1]["loss"] < rows[0]["loss"] and max(row["grad_norm"] for row in rows[4:]) < 50


def test_a_rank_without_a_gpu_of_its_own_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # of one alone, each of Slurm's tasks has its own
    for name, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"rank 2 of this machine has no GPU: 2 visible.*CUDA_VISIBLE_DEVICES="):
        join(10.0)
