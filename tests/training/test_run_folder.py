"""A run's folder: held by one run at a time, told of to others, and never lost by what reads it."""

import errno
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from training_fakes import configuration, events

from data_pipeline.errors import UserError
from pretrain.configuration import dump_config
from pretrain.training import run


def go(output: Path, **changes: object) -> int:
    """One process: this one."""
    return run(configuration(**changes), output)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    assert go(tmp_path / "run", training__stop_after=8) == 75
    return tmp_path / "run"


def test_a_second_run_in_the_same_folder_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("pretrain.training.folder.AFTER_THE_GRACE", 0.1)
    with open(finished / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process is training here, and has not ended within 0\.2 s"):
            go(finished, training__policy={"grace_seconds": 0.1})
    assert go(finished) == 0


def test_a_start_waits_for_ranks_that_are_still_ending(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = subprocess.Popen(
        ["flock", str(finished / ".lock"), "bash", "-c", "echo held; sleep 1.5"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert go(finished) == 0
    assert capsys.readouterr().err.count("waiting for it") == 1
    assert holder.wait(10) == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_flock_holds_runs_all_the_same(
    finished: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "not here")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert go(finished) == 0
    assert not (finished / ".lock.held").exists()


def test_a_closed_output_ends_no_run(tmp_path: Path) -> None:
    """Nobody reads what the rank prints, from its start on: `internimage pretrain ... | head -n 0`."""
    reader, writer = os.pipe()
    os.close(reader)
    config = tmp_path / "c.yaml"
    config.write_text(dump_config(configuration(training__stop_after=4)))
    words = [sys.executable, str(Path(__file__).with_name("training_fakes.py")), str(config), str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, stdout=writer, stderr=writer, env=environment, timeout=120)
    os.close(writer)
    assert ended.returncode == 75
    assert [e["reason"] for e in events(tmp_path / "run", "stopped")] == ["training.stop_after"]


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, object]] = []
    board = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **named: started.append(named) or board)
    )
    assert go(tmp_path / "run", training__wandb="project", training__stop_after=2) == 75
    assert go(tmp_path / "run", training__wandb="project", training__stop_after=4) == 75
    assert len({named["id"] for named in started}) == 1 and len(started) == 2
    assert go(tmp_path / "other", training__wandb="project", training__stop_after=2) == 75
    assert started[0]["id"] != started[2]["id"]


def test_a_users_command_gets_the_events_and_its_failure_is_its_own(tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = f"{{ cat; echo $INTERNIMAGE_EVENT; }} >> {told}; exit 3"
    assert go(tmp_path / "run", training__on_event=command, training__stop_after=2) == 75
    deadline = time.monotonic() + 20
    while not told.exists() or "stopped" not in told.read_text().splitlines():
        assert time.monotonic() < deadline, "nobody was told of the end"
        time.sleep(0.05)
    kinds = [json.loads(line)["kind"] for line in told.read_text().splitlines() if line.startswith("{")]
    assert kinds[0] == "start" and "stopped" in kinds and "checkpoint" not in kinds


def test_a_large_file_of_events_is_turned_over_and_nothing_reads_it_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.training.logging.record.LARGEST_EVENTS", 100)
    before = (finished / "events.jsonl").read_bytes()
    monkeypatch.setattr("pretrain.training.safeguards.bad_samples.read_jsonl", lambda path: pytest.fail("parsed"))
    assert go(finished) == 0
    assert (finished / "events.1.jsonl").read_bytes() == before
    assert events(finished)[0]["kind"] == "resume"
