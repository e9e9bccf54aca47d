"""Requests to stop, at every moment: saved at the step boundary, exit 75 on all ranks, and the same command goes on."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from training_fakes import Ranks, configuration, events, finish, logs, metrics, run_ranks, start_ranks, wait_until

from pretrain.training import run
from pretrain.training.checkpoint.disk import complete_checkpoints, load_weights
from pretrain.training.safeguards.interruption import Interruption


def test_every_kind_of_request_saves_and_exits_75_and_the_end_is_the_unbroken_one(tmp_path: Path) -> None:
    config = configuration(schedule__steps=30, checkpoint__every_steps=5, training__policy={"grace_seconds": 300})
    quiet, output = tmp_path / "unbroken", tmp_path / "run"
    assert run_ranks(config, quiet, 2, FAKE_WIDTH="300") == [0, 0], logs(quiet)[-3000:]

    def part(moment: Callable[[], bool], act: Callable[[Ranks], None]) -> None:
        ranks = start_ranks(config, output, 2, FAKE_WIDTH="300", FAKE_SLEEP="0.05")
        wait_until(moment, ranks)
        act(ranks)
        assert finish(ranks) == [75, 75], logs(output)[-3000:]
        assert (output / "checkpoints" / "latest").is_file()

    def steps() -> int:
        return len(metrics(output)) if (output / "metrics.jsonl").exists() else 0

    def writing() -> bool:
        return bool(list((output / "checkpoints").glob(".writing-*")))

    # During start-up, to one rank only: nothing was trained, and the checkpoint of step 0 says so.
    part(lambda: (output / ".lock").exists(), lambda ranks: ranks[1].send_signal(signal.SIGTERM))
    assert [c.step for c in complete_checkpoints(output)] == [0]
    assert events(output, "stopped")[-1]["reason"] == "request on another rank"

    # What Slurm sends, while a checkpoint is being written.
    def slurm(ranks: Ranks) -> None:
        for rank in ranks:
            rank.send_signal(signal.SIGUSR1)
        time.sleep(0.02)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)

    part(writing, slurm)
    assert events(output, "stopped")[-1]["reason"] == "SIGUSR1"

    # Ctrl-C reaches every rank, and twice.
    before = steps()

    def twice(ranks: Ranks) -> None:
        for rank in ranks * 2:
            rank.send_signal(signal.SIGINT)

    part(lambda: steps() > before + 2, twice)

    # The stop file, which is gone afterwards, so that the same command goes on.
    before = steps()
    part(lambda: steps() > before + 1, lambda ranks: (output / "stop").touch())
    assert events(output, "stopped")[-1]["reason"] == "stop file" and not (output / "stop").exists()

    assert run_ranks(config, output, 2, FAKE_WIDTH="300") == [0, 0], logs(output)[-3000:]
    for which in ("model", "ema"):
        one, other = load_weights(output, which)[0], load_weights(quiet, which)[0]
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert [e["loss"] for e in metrics(output)] == [e["loss"] for e in metrics(quiet)]


def test_a_stop_that_takes_longer_than_its_grace_ends_in_143_and_the_checkpoint_before_holds(tmp_path: Path) -> None:
    output = tmp_path / "run"
    short = configuration(training__policy={"grace_seconds": 2.0}, checkpoint__every_steps=2)
    # In the step that follows the save: it is completed though no boundary comes any more.
    ranks = start_ranks(short, output, 2, FAKE_STALL="4")
    wait_until(lambda: (output / "checkpoints" / "step-00000004").is_dir(), ranks)
    time.sleep(0.5)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    assert finish(ranks) == [143, 143], logs(output)[-3000:]
    assert {event["rank"] for event in events(output, "grace_exceeded")} == {0, 1}
    assert "_misbehave" in (output / "stacks-rank-00001.txt").read_text()
    assert run_ranks(configuration(checkpoint__every_steps=2), output, 2) == [0, 0], logs(output)[-3000:]
    assert events(output, "resume")[-1]["step"] == 4


def test_a_request_before_the_run_begins_stops_it_at_the_first_boundary(tmp_path: Path) -> None:
    early = Interruption()
    early.request("SIGUSR1")
    assert run(configuration(), tmp_path / "run", interruption=early) == 75
    assert [event["reason"] for event in events(tmp_path / "run", "stopped")] == ["SIGUSR1"]
    assert not metrics(tmp_path / "run"), "no step was taken"


def test_only_a_late_second_ctrl_c_leaves_at_once() -> None:
    now, left = [0.0], []
    interruption = Interruption(clock=lambda: now[0], leave=left.append)
    interruption._handle(signal.SIGINT, None)
    now[0] = 0.5  # the launcher's copy of the same key press
    interruption._handle(signal.SIGINT, None)
    assert left == [] and interruption.reason == "SIGINT"
    now[0] = 2.5
    interruption._handle(signal.SIGINT, None)
    assert left == [130]


def test_usr1_followed_by_term_is_one_request() -> None:
    left: list[int] = []
    interruption = Interruption(clock=lambda: 0.0, leave=left.append)
    interruption._handle(signal.SIGUSR1, None)
    interruption._handle(signal.SIGTERM, None)
    assert interruption.reason == "SIGUSR1" and left == []
