"""Steps and ranks that go wrong: the policy holds, the run ends as stated."""

import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from training_fakes import configuration, events, finish, logs, metrics, run_ranks, start_ranks

from data_pipeline.durable import temporary_path
from data_pipeline.errors import GaveUpError
from pretrain.configuration.schema import PolicyConfig
from pretrain.training import run
from pretrain.training.checkpoint.disk import load_weights, mark_best
from pretrain.training.safeguards.policy import SETTLED, DivergencePolicy, StepDecision


def go(output: Path, **changes: object) -> int:
    return run(configuration(**changes), output)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("where", ["FAKE_NAN", "FAKE_NAN_GRADIENT"])
def test_a_nan_of_the_loss_or_a_gradient_skips_the_step_under_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, where: str
) -> None:
    monkeypatch.setenv(where, "5")
    assert go(tmp_path / "run", training__zero_stage=stage) == 0
    skipped = events(tmp_path / "run", "step_not_applied")
    assert [(e["step"], e["verdict"]) for e in skipped] == [(5, "skip")]
    assert len(metrics(tmp_path / "run")) == 12
    assert isinstance(skipped[0]["loss"], str if where == "FAKE_NAN" else float)
    # As if the batch had never been there: the step is named as one to pass over before the run begins.
    monkeypatch.delenv(where)
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "policy.json").write_text(json.dumps({"passed_over": [5], "rollbacks": 0}))
    assert go(tmp_path / "without", training__zero_stage=stage) == 0
    for which in ("model", "ema"):
        found, expected = load_weights(tmp_path / "run", which)[0], load_weights(tmp_path / "without", which)[0]
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_nan_in_one_sample_of_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run_ranks(configuration(training__zero_stage=2), output, 2, FAKE_NAN="3,7") == [0, 0], logs(output)[-3000:]
    assert [e["step"] for e in events(output, "step_not_applied")] == [3, 7]
    assert all(torch.isfinite(value).all() for value in load_weights(output)[0].values())


def test_nan_without_end_is_rolled_back_and_then_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NAN", ",".join(map(str, range(6, 12))))
    output = tmp_path / "run"
    with pytest.raises(GaveUpError, match="gave up at step 9 after 1 rollbacks"):
        go(output, training__policy={"max_skipped": 1, "rollbacks": 1})
    assert [(e["to"], e["passed_over"]) for e in events(output, "rollback")] == [(4, [6, 7])]
    assert json.loads((output / "policy.json").read_text()) == {"passed_over": [6, 7], "rollbacks": 1}
    assert ["gave up at step 9" in e["message"] for e in events(output, "gave_up")] == [True]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_spike_is_rolled_back_and_its_batch_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    shape = {"schedule__steps": 26, "training__zero_stage": stage, "training__policy": {"spike_factor": 10.0}}
    monkeypatch.setenv("FAKE_SPIKE", "22")
    assert go(tmp_path / "run", **shape) == 0
    assert [(e["step"], e["to"], e["passed_over"]) for e in events(tmp_path / "run", "rollback")] == [(22, 20, [22])]
    monkeypatch.delenv("FAKE_SPIKE")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "policy.json").write_text(json.dumps({"passed_over": [22], "rollbacks": 0}))
    assert go(tmp_path / "without", **shape) == 0
    found, expected = load_weights(tmp_path / "run")[0], load_weights(tmp_path / "without")[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rows, others = metrics(tmp_path / "run"), metrics(tmp_path / "without")
    assert [row["step"] for row in rows] == [step for step in range(1, 27) if step != 23], "each step once"
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]
    assert board(tmp_path / "run") == board(tmp_path / "without") == pytest.approx({r["step"]: r["loss"] for r in rows})


def board(output: Path) -> dict[int, float]:
    """The losses that TensorBoard shows, by step; fails where it shows a step twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = EventAccumulator(str(output / "tensorboard")).Reload().Scalars("loss")
    assert len({scalar.step for scalar in scalars}) == len(scalars)
    return {scalar.step: scalar.value for scalar in scalars}


def test_by_default_a_loss_near_0_may_vary_and_a_large_one_may_not_leap(tmp_path: Path) -> None:
    policy = DivergencePolicy(PolicyConfig(), tmp_path, leader=True)
    for low in range(SETTLED):
        assert policy.decide(low, 0.01) is StepDecision.APPLY
        policy.record(low, 0.01, applied=True)
    assert policy.decide(SETTLED, 0.9) is StepDecision.APPLY
    assert policy.decide(SETTLED, 1.2) is StepDecision.ROLL_BACK
    high = DivergencePolicy(PolicyConfig(), tmp_path, leader=True)
    for step in range(SETTLED):
        high.record(step, 4.0, applied=True)
    assert high.decide(SETTLED, 19.0) is StepDecision.APPLY
    assert high.decide(SETTLED, 21.0) is StepDecision.ROLL_BACK


def test_a_rollback_and_the_best_checkpoint_are_noted_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    policy = DivergencePolicy(PolicyConfig(), tmp_path, leader=True)
    policy.record(3, math.nan, applied=False)
    policy.roll_back()
    assert synced == [str(temporary_path(tmp_path / "policy.json")), str(tmp_path)]
    synced.clear()
    folder = tmp_path / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    mark_best(tmp_path, 3)
    assert synced == [str(temporary_path(folder.with_name("best"))), str(folder.parent)]


def test_a_spike_before_the_first_checkpoint_is_only_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SPIKE", "18")
    settings = {"schedule__steps": 20, "checkpoint__every_steps": None, "training__policy": {"spike_factor": 10.0}}
    assert go(tmp_path / "run", **settings) == 0
    assert [e["to"] for e in events(tmp_path / "run", "rollback")] == [None]
    assert max(e["loss"] for e in metrics(tmp_path / "run") if e["step"] != 19) < 10


def test_a_hung_rank_ends_the_run_with_4_and_the_stacks_of_all_ranks(tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = configuration(training__policy={"hang_seconds": 8.0})
    assert run_ranks(config, output, 2, FAKE_HANG="3") == [4, 4], logs(output)[-3000:]
    assert "_misbehave" in (output / "stacks-rank-00001.txt").read_text()
    assert "Thread" in (output / "stacks-rank-00000.txt").read_text()
    assert {e["rank"] for e in events(output, "hang")} == {0, 1}


def test_a_rank_that_dies_ends_the_others_and_the_next_start_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "run"
    ranks = start_ranks(configuration(), output, 2, FAKE_DEATH="6")
    deadline = time.monotonic() + 90
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    alone = ranks[0].poll()
    assert finish(ranks)[1] == -9
    assert alone == 1, "the survivor leaves by itself, with an error"
    assert [(e["rank"], bool(e["message"])) for e in events(output, "failed")] == [(0, True)]
    assert run_ranks(configuration(), output, 2) == [0, 0], logs(output)[-3000:]
    assert events(output, "resume")[-1]["step"] == 4
