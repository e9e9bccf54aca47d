"""Steps and ranks that go wrong: the policy holds, the run ends as stated."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from training_fakes import configuration, events, finish, logs, metrics, run_ranks, start_ranks

from data_pipeline.durable import temporary_path
from data_pipeline.errors import GaveUpError
from pretrain.configuration.schema import PolicyConfig
from pretrain.training import run
from pretrain.training.checkpoint.disk import complete_checkpoints, load_weights, mark_best
from pretrain.training.safeguards.policy import (
    SETTLED,
    WINDOW,
    DivergencePolicy,
    StepDecision,
    Taken,
    drift_start,
    read_policy,
)


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
    assert json.loads((output / "policy.json").read_text()) == {"passed_over": [6, 7], "rolled_back": [7]}
    assert ["gave up at step 9" in e["message"] for e in events(output, "gave_up")] == [True]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_spike_is_only_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    shape = {"schedule__steps": 26, "training__zero_stage": stage, "training__policy": {"spike_factor": 10.0}}
    monkeypatch.setenv("FAKE_SPIKE", "22")
    assert go(tmp_path / "run", **shape) == 0
    assert [(e["step"], e["verdict"]) for e in events(tmp_path / "run", "step_not_applied")] == [(22, "skip")]
    assert not events(tmp_path / "run", "rollback")
    monkeypatch.delenv("FAKE_SPIKE")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "policy.json").write_text(json.dumps({"passed_over": [22], "rollbacks": 0}))
    assert go(tmp_path / "without", **shape) == 0
    found, expected = load_weights(tmp_path / "run")[0], load_weights(tmp_path / "without")[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rows, others = metrics(tmp_path / "run"), metrics(tmp_path / "without")
    assert [row["loss"] for row in rows if row["step"] != 23] == [row["loss"] for row in others]


def test_isolated_spikes_in_a_long_healthy_run_never_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SPIKE", "24,55,80,110")
    assert go(tmp_path / "run", schedule__steps=120, checkpoint__every_steps=50, training__log_every=20) == 0
    assert [e["step"] for e in events(tmp_path / "run", "step_not_applied")] == [24, 55, 80, 110]
    assert not events(tmp_path / "run", "rollback")


def test_a_rollback_goes_back_before_the_drift_and_meets_other_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 40 to 47 drift, 48 to 50 are not finite; there are checkpoints of 36 and 44, the latter in the drift."""
    monkeypatch.setenv("FAKE_DRIFT", ",".join(map(str, range(40, 48))))
    monkeypatch.setenv("FAKE_NAN", "48,49,50")
    output = tmp_path / "run"
    shape = {"schedule__steps": 60, "checkpoint__every_steps": 4, "checkpoint__keep": 20, "optimizer__lr": 1e-3}
    assert go(output, training__policy={"max_skipped": 2}, **shape) == 0
    (rollback,) = events(output, "rollback")
    assert (rollback["step"], rollback["to"]) == (50, 40) and rollback["passed_over"] == list(range(40, 51))
    steps = [row["step"] for row in metrics(output)]
    assert steps == [step for step in range(1, 61) if not 41 <= step <= 51], "each step once, none of the drift"
    monkeypatch.delenv("FAKE_DRIFT")
    monkeypatch.delenv("FAKE_NAN")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "policy.json").write_text(json.dumps({"passed_over": list(range(40, 51))}))
    assert go(tmp_path / "without", **shape) == 0
    found, expected = load_weights(output)[0], load_weights(tmp_path / "without")[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rows, others = metrics(output), metrics(tmp_path / "without")
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]
    assert board(output) == board(tmp_path / "without") == pytest.approx({r["step"]: r["loss"] for r in rows})


def test_a_crash_after_a_rollback_does_not_resume_the_line_that_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DRIFT", ",".join(map(str, range(40, 48))))
    monkeypatch.setenv("FAKE_NAN", "48,49,50")
    shape = {"schedule__steps": 60, "checkpoint__every_steps": 4, "checkpoint__keep": 20, "optimizer__lr": 1e-3}
    output = tmp_path / "run"
    shape["training__policy"] = {"max_skipped": 2}
    with monkeypatch.context() as patch:

        def crash(self: DivergencePolicy, state: object) -> None:
            raise RuntimeError("right after the rollback")

        patch.setattr(DivergencePolicy, "load", crash)
        with pytest.raises(RuntimeError, match="right after"):
            go(output, **shape)
    assert complete_checkpoints(output)[0].step == 40
    assert go(output, **shape) == 0
    assert [e["step"] for e in events(output, "resume")] == [40]


def settled(policy: DivergencePolicy, steps: int, loss: float = 1.0, norm: float = 1.0) -> None:
    for step in range(steps):
        assert policy.record(step, loss + 0.01 * (step % 3), norm, applied=True) is StepDecision.APPLY


def test_the_budget_of_rollbacks_recovers_with_healthy_steps(tmp_path: Path) -> None:
    policy = DivergencePolicy(PolicyConfig(rollbacks=1, rollback_window=100), tmp_path, None, leader=True)
    for step in (50, 200, 350):
        policy.record(step, math.nan, math.nan, applied=False)
        assert policy.roll_back(step).passed_over == (step,)
    later = DivergencePolicy(policy.config, tmp_path, read_policy(tmp_path), leader=True)
    with pytest.raises(GaveUpError, match=r"after 1 rollbacks within 100 steps(.|\n)*--allow-change optimizer.lr"):
        later.roll_back(360)


def test_the_start_of_a_drift_is_found_by_loss_or_by_norm() -> None:
    healthy = [Taken(step, 1.0 + 0.01 * (step % 3), 1.0) for step in range(100)]
    assert drift_start(healthy, 100) == 100
    rising = [Taken(step, 1.2 + 0.05 * (step - 100), 1.0) for step in range(100, 110)]
    assert drift_start(healthy + rising, 110) == 100
    steep = [Taken(step, 1.0, 9.0) for step in range(100, 105)]
    assert drift_start(healthy + steep, 105) == 100
    single = [Taken(100, 3.0, 9.0)] + [Taken(step, 1.0, 1.0) for step in range(101, 120)]
    assert drift_start(healthy + single, 120) == 120, "one odd step long before is no drift"


def test_skips_that_are_not_in_a_row_add_up(tmp_path: Path) -> None:
    policy = DivergencePolicy(PolicyConfig(max_skipped=3), tmp_path, None, leader=True)
    verdicts = [policy.record(step, 1.0, 1.0, applied=step % 2 == 0) for step in range(2 * WINDOW)]
    assert verdicts.index(StepDecision.ROLL_BACK) == 2 * (WINDOW // 4) + 1


def test_a_resumed_run_counts_the_skips_of_before(tmp_path: Path) -> None:
    def verdicts(saved_at: int | None) -> list[StepDecision]:
        policy = DivergencePolicy(PolicyConfig(max_skipped=3), tmp_path, None, leader=True)
        found = []
        for step in range(WINDOW):
            if step == saved_at:
                state = json.loads(json.dumps(policy.state()))
                policy = DivergencePolicy(policy.config, tmp_path, None, leader=True)
                policy.load(state)
            found.append(policy.record(step, 1.0, 1.0, applied=step % 2 == 0))
        return found

    unbroken = verdicts(None)
    assert StepDecision.ROLL_BACK in unbroken
    assert all(verdicts(step) == unbroken for step in (1, 10, 2 * (WINDOW // 4)))


def board(output: Path) -> dict[int, float]:
    """The losses that TensorBoard shows, by step; fails where it shows a step twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = EventAccumulator(str(output / "tensorboard")).Reload().Scalars("loss")
    assert len({scalar.step for scalar in scalars}) == len(scalars)
    return {scalar.step: scalar.value for scalar in scalars}


def test_by_default_a_loss_near_0_may_vary_and_a_large_one_may_not_leap(tmp_path: Path) -> None:
    policy = DivergencePolicy(PolicyConfig(), tmp_path, None, leader=True)
    for low in range(SETTLED):
        assert policy.decide(low, 0.01) is StepDecision.APPLY
        policy.record(low, 0.01, 1.0, applied=True)
    assert policy.decide(SETTLED, 0.9) is StepDecision.APPLY
    assert policy.decide(SETTLED, 1.2) is StepDecision.SKIP
    high = DivergencePolicy(PolicyConfig(), tmp_path, None, leader=True)
    for step in range(SETTLED):
        high.record(step, 4.0, 1.0, applied=True)
    assert high.decide(SETTLED, 19.0) is StepDecision.APPLY
    assert high.decide(SETTLED, 21.0) is StepDecision.SKIP


def test_a_rollback_and_the_best_checkpoint_are_noted_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    policy = DivergencePolicy(PolicyConfig(), tmp_path, None, leader=True)
    policy.record(3, math.nan, math.nan, applied=False)
    policy.roll_back(3)
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
    assert not events(tmp_path / "run", "rollback")
    assert max(e["loss"] for e in metrics(tmp_path / "run") if e["step"] != 19) < 10


def test_a_hung_rank_ends_the_run_with_5_and_the_stacks_of_all_ranks(tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = configuration(training__policy={"hang_seconds": 8.0})
    assert run_ranks(config, output, 2, FAKE_HANG="3") == [5, 5], logs(output)[-3000:]
    assert "_misbehave" in (output / "stacks-rank-00001.txt").read_text()
    assert "Thread" in (output / "stacks-rank-00000.txt").read_text()
    assert {e["rank"] for e in events(output, "hang")} == {0, 1}


def test_a_rank_that_dies_ends_the_others_and_the_next_start_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "run"
    ranks = start_ranks(configuration(), output, 2, FAKE_DEATH="6")
    try:
        assert ranks[1].wait(300) == -9
        assert ranks[0].wait(120) == 1, "the survivor leaves by itself, with an error"
    finally:
        finish(ranks)
    (failed,) = events(output, "failed")
    assert failed["rank"] == 0 and failed["message"] and failed["node"]
    assert failed["lost_partner"], "so that its node is not blamed"
    assert go(output) == 0
    assert events(output, "resume")[-1]["step"] == 4
