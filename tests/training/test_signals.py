"""Requests to stop, at every moment: saved at the step boundary, exit 75 on all ranks, and the same command goes on."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from training_fakes import configuration, events, finish, logs, metrics, run_ranks, start_ranks

from pretrain.training.checkpoints import complete_checkpoints, load_weights

Ranks = list[subprocess.Popen[str]]


def wait_until(condition: Callable[[], bool], ranks: Ranks) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), "ended before its moment"
        time.sleep(0.002)


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
