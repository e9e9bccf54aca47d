"""`status` and `logs` as a user meets them, on runs that training itself has written."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch.cli import run
from launch.following import follow, last_lines, log_of
from launch.restarting import END, HISTORY, RESTART, Decision, Ended, remember
from launch.slurm import JOB
from launch.status import describe, duration, state_of, status

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that its user stopped after 6 of 12 steps."""
    from training_fakes import configuration, logs, run_ranks

    output = tmp_path_factory.mktemp("stopped") / "run"
    assert run_ranks(configuration(training__stop_after=6), output, 2) == [75, 75], logs(output)[-3000:]
    return output


def test_a_stopped_run_says_where_it_stands(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = status(stopped)
    assert (found.state, found.why, found.step, found.total_steps) == ("stopped", "training.stop_after", 6, 12)
    assert found.checkpoint == "step-00000006" and found.starts == 1 and found.seconds_left is None
    assert found.slowest is not None and found.slowest.startswith("rank ")
    assert run(["status", str(stopped)]) == 0
    text = capsys.readouterr().out
    assert "stopped (training.stop_after)" in text and "step 6 of 12, checkpoint step-00000006" in text
    assert run(["status", str(stopped), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "stopped"


def test_a_live_run_has_a_forecast_and_a_quiet_one_is_told_of() -> None:
    events = [{"kind": "resume", "time": 1000.0}]
    rows = [{"time": 1000.0 + 10 * n, "step": n} for n in range(3)]
    assert state_of(events, rows, 1025.0) == ("running", None)
    assert state_of(events, rows, 1020.0 + 601)[0] == "silent"
    slow = [{"time": 1000.0 + 900 * n, "step": n} for n in range(3)]
    assert state_of(events, slow, 2800.0 + 3600)[0] == "running", "ten times the usual distance is not over"
    assert state_of([*events, {"kind": "failed", "message": "no"}], rows, 9e9) == ("failed", "no")
    assert state_of([], [], 0.0) == ("new", None)
    assert [duration(seconds) for seconds in (5, 125, 7500, 100000)] == ["5 s", "2 min 5 s", "2 h 5 min", "1 d 3 h"]


def test_restarts_and_the_slurm_job_are_shown(
    stopped: Path, fake_program: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(stopped / HISTORY, Ended(139, node="n7", rank=58), Decision(RESTART, "exit code 139"), "41")
    remember(stopped / HISTORY, Ended(75, by_user=True), Decision(END, "as asked"), "41")
    (stopped / JOB).write_text(json.dumps({"number": "41"}))
    fake_program("squeue", '[ "$3" = 41 ] && echo "PENDING (Resources)"')
    found = status(stopped)
    assert found.job == "41 PENDING (Resources)"
    assert "exit 139, first rank 58 on n7: restart (exit code 139)" in found.restarts[0]
    assert "Slurm job: 41 PENDING" in describe(found)
    monkeypatch.setenv("PATH", os.devnull)
    assert status(stopped).job == "41 (no Slurm on this machine)"


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().err


def test_logs_show_the_end_of_the_right_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    with pytest.raises(UserError, match="without Slurm rank 0 writes to the terminal"):
        log_of(tmp_path, 0)
    (folder / "rank-00003.log").write_text("".join(f"line {n}\n" for n in range(100)))
    (folder / "slurm-7.out").write_text("older\n")
    (folder / "slurm-8.out").write_text("newer\n")
    os.utime(folder / "slurm-7.out", (1, 1))
    assert last_lines(log_of(tmp_path, 3), 2) == "line 98\nline 99"
    assert run(["logs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "newer\n"
    assert run(["logs", str(tmp_path), "--rank", "5"]) == 2
    assert "there are ranks 3 to 3" in capsys.readouterr().err


def test_following_gives_what_is_added_and_begins_again_where_a_file_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    additions = iter(["one\n", "two\n", None])

    def add(_: float) -> None:
        text = next(additions)
        if text is None:
            path.write_text("new\n")
        else:
            with path.open("a") as file:
                file.write(text)

    grown = follow(path, sleep=add)
    assert [next(grown), next(grown), next(grown)] == ["one\n", "two\n", "new\n"]
