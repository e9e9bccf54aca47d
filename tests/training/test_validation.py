"""Scores while a run trains: those of the checkpoints, on all ranks, without changing the run."""

import json
from pathlib import Path

import pytest
from training_fakes import HELD_OUT, FakeTask, configuration, events, hits_of, logs, metrics, run_ranks

from data_pipeline.errors import UserError
from pretrain.configuration import RunConfig
from pretrain.training import run
from pretrain.training.checkpoint.disk import find_checkpoint, load_weights
from pretrain.training.safeguards.interruption import Interruption


def validated(data: str = "held out", **changes: object) -> RunConfig:
    """The average moves so fast that every score is another."""
    average = {"teacher_start": 0.2, "teacher_end": 0.2}
    evaluation = {"every_steps": 5, "data": data}
    return configuration(evaluation=evaluation, checkpoint__keep=9, training__ema=average, **changes)


def history(output: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["top1"]) for entry in json.loads((output / "validation.json").read_text())]


def accuracy(output: Path, step: int) -> float:
    module = FakeTask()
    module.load_state_dict(load_weights(output, "ema", str(step))[0])
    return sum(hits_of(module.eval(), range(HELD_OUT))) / HELD_OUT


def test_two_ranks_score_the_average_and_the_run_is_as_without(tmp_path: Path) -> None:
    cut, plain, asked = tmp_path / "cut", tmp_path / "plain", tmp_path / "asked"
    work = {
        tmp_path / "flat": validated(),
        cut: validated(training__zero_stage=3),
        plain: configuration(training__ema=validated().training.ema.model_dump()),
        asked: validated("asked"),
    }
    assert run_ranks(work, tmp_path / "run", 2, FAKE_ASKED="1") == [75, 75], logs(tmp_path / "run")[-3000:]
    for output in (tmp_path / "flat", cut):
        assert history(output) == [(step, accuracy(output, step)) for step in (5, 10, 12)]
        assert len({score for _, score in history(output)}) > 1
        assert find_checkpoint(output, "best").step == max(history(output), key=lambda entry: (entry[1], -entry[0]))[0]
    assert [e["loss"] for e in metrics(tmp_path / "flat")] == [e["loss"] for e in metrics(plain)]
    # Rank 1 was asked to stop while it evaluated: all ranks leave, and the next start begins with the score.
    assert not (asked / "validation.json").exists() and find_checkpoint(asked).step == 5
    assert run(validated("asked"), asked) == 0
    assert history(asked) == [(step, accuracy(asked, step)) for step in (5, 10, 12)]
    assert [(e["step"], e["evaluation"], e["score"]) for e in events(asked, "validated")] == [
        (5, "nearest", "top1"), (10, "nearest", "top1"), (12, "nearest", "top1"),
    ]  # fmt: skip


def test_a_score_of_a_lost_step_is_forgotten(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run(validated(training__stop_after=11), output) == 75
    first = history(output)
    for step in (10, 11):
        for file in (output / "checkpoints" / f"step-{step:08d}").iterdir():
            file.unlink()
    assert run(validated(), output) == 0
    assert history(output)[:2] == first and [e["step"] for e in events(output, "validated")] == [5, 10, 10, 12]


def test_a_request_before_the_last_score_ends_in_75(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interruption = Interruption()
    evaluate = type(configuration().task).evaluate

    def asked(self: object, *arguments: object, **named: object) -> object:
        interruption.request("SIGUSR1")
        return evaluate(self, *arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("training_fakes.Fake.evaluate", asked)
        config = configuration(evaluation={"every_steps": 100, "data": "held out"})
        assert run(config, tmp_path / "run", interruption=interruption) == 75
    assert run(config, tmp_path / "run") == 0
    assert [step for step, _ in history(tmp_path / "run")] == [12]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_steps": 5}, r"evaluation\.every_steps needs a set: give evaluation\.data"),
        ({"every_steps": 5, "data": "x", "name": "top2"}, r"evaluation\.name 'top2': task .* has nearest"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(configuration(evaluation=settings), tmp_path / "run")
