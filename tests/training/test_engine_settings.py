"""The settings that ZeRO knows beside its stages: offload, accumulation in bf16, pass-through; and the measurements."""

import json
from pathlib import Path

import pytest
import torch
from training_fakes import CLASSES, PIXELS, configuration, factories, metrics

from data_pipeline.errors import UserError
from pretrain.training import run
from pretrain.training.checkpoints import load_weights
from pretrain.training.deepspeed_config import derive


def go(output: Path, **changes: object) -> int:
    return run(configuration(**changes), output, factories=factories())


@pytest.mark.parametrize(
    "changes",
    [
        {"training__zero_stage": 1, "training__offload_optimizer": True},
        {"training__zero_stage": 2, "training__offload_optimizer": True, "training__accumulation": 2},
        {"training__zero_stage": 3, "training__offload_optimizer": True, "training__offload_parameters": True},
    ],
    ids=["stage 1", "stage 2", "stage 3"],
)
def test_offload_trains_as_without_it_and_resumes_exactly(tmp_path: Path, changes: dict[str, object]) -> None:
    assert go(tmp_path / "plain", training__accumulation=changes.get("training__accumulation", 1)) == 0
    assert go(tmp_path / "whole", **changes) == 0
    assert go(tmp_path / "parts", training__stop_after=5, **changes) == 75
    assert go(tmp_path / "parts", **changes) == 0
    plain, whole, parts = (load_weights(tmp_path / name)[0] for name in ("plain", "whole", "parts"))
    for name, value in plain.items():
        torch.testing.assert_close(whole[name], value, atol=1e-5, rtol=1e-5)
        assert torch.equal(whole[name], parts[name]), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_with_accumulation_follows_fp32_and_resumes_exactly(tmp_path: Path, stage: int) -> None:
    same = {"training__zero_stage": stage, "training__accumulation": 2}
    assert go(tmp_path / "fp32", **same) == 0
    assert go(tmp_path / "whole", training__precision="bf16", **same) == 0
    assert go(tmp_path / "parts", training__precision="bf16", training__stop_after=5, **same) == 75
    assert go(tmp_path / "parts", training__precision="bf16", **same) == 0
    whole, parts = load_weights(tmp_path / "whole")[0], load_weights(tmp_path / "parts")[0]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in whole.values()), "the average is fp32"
    close = [entry["loss"] for entry in metrics(tmp_path / "fp32")]
    assert [entry["loss"] for entry in metrics(tmp_path / "whole")] == pytest.approx(close, abs=0.05)


def test_flops_are_counted_from_the_matrix_products(tmp_path: Path) -> None:
    assert go(tmp_path / "run") == 0
    forward = 2 * (PIXELS * 33 + 33 * 33 + 33 * CLASSES)
    entry = metrics(tmp_path / "run")[-1]
    assert entry["tflops_per_rank"] == pytest.approx(3 * forward * entry["images_per_second"] / 1e12)


def test_a_window_of_steps_is_traced(tmp_path: Path) -> None:
    assert go(tmp_path / "run", training__profile="2:4") == 0
    trace = json.loads((tmp_path / "run" / "trace-rank-00000.json").read_text())
    assert any("addmm" in str(event.get("name")) for event in trace["traceEvents"])


def test_what_we_do_not_name_is_passed_on_and_wins() -> None:
    config = configuration(
        deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "comms_logger": {"enabled": True}}
    )
    derived = derive(config, world_size=2, parameters=1000, cuda=False)
    assert derived["zero_optimization"]["reduce_bucket_size"] == 7
    assert derived["zero_optimization"]["stage"] == 1
    assert derived["comms_logger"] == {"enabled": True}
    assert derived["train_micro_batch_size_per_gpu"] == 8


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "not divisible"),
        ({"training__precision": "fp16"}, 1, "needs a GPU"),
        ({"training__zero_stage": 0, "training__offload_optimizer": True}, 1, "offload_optimizer needs zero_stage"),
        ({"training__zero_stage": 2, "training__offload_parameters": True}, 1, "offload_parameters needs zero_stage 3"),
    ],
)
def test_settings_that_cannot_be_are_user_errors(changes: dict[str, object], ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        derive(configuration(**changes), world_size=ranks, parameters=1000, cuda=False)
