"""`internimage inspect loader`: workers advised by a measurement on the run's own shards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import run

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(tiny_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Ask:
    config = str(tiny_run())

    def inspect(*options: str) -> dict[str, Any]:
        assert run(["inspect", "loader", config, "--seconds", "0.05", "--json", *options]) == 0
        return dict(json.loads(capsys.readouterr().out))

    return inspect


def test_the_workers_follow_from_the_speed_of_one_core_and_what_training_takes(ask: Ask) -> None:
    alone = ask()
    rate = alone["samples_per_second_of_one_core"]
    assert rate > 0 and "workers" not in alone
    slow, fast = ask("--samples-per-second", "0.01"), ask("--samples-per-second", "1000000")
    assert slow["workers_needed"] == 1 and slow["enough"]
    assert fast["workers_needed"] > 1 and not fast["enough"]


def test_processes_share_the_cores(ask: Ask) -> None:
    one, two = ask("--processes", "1"), ask("--processes", "2")
    assert two["cores_per_process"] == pytest.approx(one["cores_per_process"] / 2, abs=0.01)


def test_missing_shards_are_a_users_mistake(tiny_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "loader", str(tiny_run()), "data.sources.0.path=/nowhere"]) == 2
    assert "'/nowhere' does not exist" in capsys.readouterr().err
