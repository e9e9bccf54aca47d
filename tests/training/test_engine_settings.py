"""The settings that ZeRO knows beside its stages: offload, accumulation in bf16, pass-through; and the measurements."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fakes import CLASSES, PIXELS, FakeTask, configuration, events, metrics

from data_pipeline.errors import UserError
from pretrain.configuration import RunConfig
from pretrain.training import run
from pretrain.training.checkpoint.checkpointer import Checkpointer
from pretrain.training.checkpoint.disk import find_checkpoint, load_weights
from pretrain.training.logging.profiling import Profiler
from pretrain.training.zero.deepspeed_config import derive, merge


def go(output: Path, **changes: object) -> int:
    return run(configuration(**changes), output)


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


@pytest.fixture
def fp16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed and `derive` refuse it there, for it is slow; it computes all the same."""
    from deepspeed.accelerator import get_accelerator

    def allowed(*sections: Any, cuda: bool, **sizes: int) -> dict[str, object]:
        return merge(derive(*sections, cuda=True, **sizes), {"zero_optimization": {"overlap_comm": cuda}})

    monkeypatch.setattr("pretrain.training.zero.engine.derive", allowed)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True, raising=False)


@pytest.mark.usefixtures("fp16_on_a_cpu")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_logs_the_true_gradient_norm_and_resumes_its_loss_scale(tmp_path: Path, stage: int) -> None:
    scaled = {"fp16": {"initial_scale_power": 6, "loss_scale_window": 3}}
    half = {"training__precision": "fp16", "training__zero_stage": stage, "deepspeed": scaled}
    assert go(tmp_path / "fp32", training__zero_stage=stage) == 0
    assert go(tmp_path / "whole", **half) == 0
    assert go(tmp_path / "parts", training__stop_after=5, **half) == 75
    before = find_checkpoint(tmp_path / "parts").state["scaler"]
    assert before["cur_scale"] > 2**6 and before["cur_iter"] == 5
    assert go(tmp_path / "parts", **half) == 0
    assert find_checkpoint(tmp_path / "parts").state["scaler"] == find_checkpoint(tmp_path / "whole").state["scaler"]
    norms = [entry["grad_norm"] for entry in metrics(tmp_path / "fp32")]
    assert [entry["grad_norm"] for entry in metrics(tmp_path / "whole")] == pytest.approx(norms, rel=0.2)
    whole, parts = load_weights(tmp_path / "whole")[0], load_weights(tmp_path / "parts")[0]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_moments_and_average_in_files_train_alike_and_no_save_copies_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    files = {"training__zero_stage": stage, "training__offload_folder": str(tmp_path / "files")}
    laid: list[int] = []
    monkeypatch.setattr(
        os, "posix_fallocate", lambda descriptor, at, size: (laid.append(size), os.truncate(descriptor, size))
    )
    monkeypatch.setattr(Checkpointer, "_stage", lambda self: pytest.fail("copied into memory"))
    assert go(tmp_path / "run", training__stop_after=5, **files) == 75
    assert go(tmp_path / "run", **files) == 0
    trained = 4 * sum(p.numel() for p in FakeTask().parameters() if p.requires_grad)
    assert sum(laid) == pytest.approx(2 * 3 * trained, rel=0.01), "two moments and the average, in two runs"
    assert not list((tmp_path / "files").iterdir()), "nothing is left of them"
    assert len(events(tmp_path / "run", "synchronous_checkpoints")) == 2
    monkeypatch.undo()
    assert go(tmp_path / "memory", training__zero_stage=stage) == 0
    found, expected = load_weights(tmp_path / "run")[0], load_weights(tmp_path / "memory")[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_that_cannot_hold_the_files_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, at: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"offload_folder .* bytes cannot be laid there \(No space left"):
        go(tmp_path / "run", training__offload_folder=str(tmp_path / "files"))


def test_flops_are_counted_from_the_matrix_products_of_the_task_and_its_teacher(tmp_path: Path) -> None:
    assert go(tmp_path / "run") == 0
    body = 2 * (PIXELS * 33 + 33 * 33)
    step = 3 * (body + 2 * 33 * CLASSES) + body  # the teacher has no backward pass
    entry = metrics(tmp_path / "run")[-1]
    assert entry["tflops_per_rank"] == pytest.approx(step * entry["images_per_second"] / 1e12)


def test_a_window_of_steps_is_traced(tmp_path: Path) -> None:
    assert go(tmp_path / "run", training__profile="2:4") == 0
    trace = json.loads((tmp_path / "run" / "trace-rank-00000.json").read_text())
    assert any("addmm" in str(event.get("name")) for event in trace["traceEvents"])


def test_a_window_whose_ends_are_passed_over_is_traced_and_closed(tmp_path: Path) -> None:
    profiler = Profiler("2:4", tmp_path, 0)
    profiler.step(1)
    profiler.step(3)
    assert not list(tmp_path.glob("trace-*"))
    profiler.step(5)
    trace = tmp_path / "trace-rank-00000.json"
    written = trace.stat().st_mtime_ns
    profiler.step(3)  # a rollback
    profiler.close()
    assert trace.stat().st_mtime_ns == written


def derived_from(config: RunConfig, world_size: int) -> dict[str, Any]:
    sections = (config.training, config.optimizer.clip_grad, config.deepspeed)
    return derive(*sections, world_size=world_size, parameters=1000, cuda=False)


def test_what_we_do_not_name_is_passed_on_and_wins() -> None:
    config = configuration(
        deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "comms_logger": {"enabled": True}}
    )
    derived = derived_from(config, world_size=2)
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
        derived_from(configuration(**changes), world_size=ranks)
