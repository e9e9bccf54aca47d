"""The demo's child processes: stopped at a step, run side by side, never left behind."""

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from data_pipeline.errors import STOPPED, UserError
from pretrain.demo import commands
from pretrain.demo.commands import Job
from pretrain.demo.walk import ranks_for

# Logs a step every 20 ms; SIGTERM ends it with 75, as a run that saved.
RUN = """
import json, pathlib, signal, sys, time
run, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with (run / "metrics.jsonl").open("a") as log:
    for step in range(1, steps + 1):
        log.write(json.dumps({"step": step}) + "\\n")
        log.flush()
        time.sleep(0.02)
        if asked:
            sys.exit(75)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.py"
    path.write_text(textwrap.dedent(RUN))
    monkeypatch.setattr(commands, "internimage", lambda arguments: [sys.executable, str(path), *arguments])
    monkeypatch.setattr(commands, "POLL_SECONDS", 0.05)


def test_a_run_is_asked_to_stop_once_it_has_reached_the_step(script: None, tmp_path: Path) -> None:
    assert commands.run_and_stop([str(tmp_path), "500"], tmp_path, stop_at=10) == STOPPED
    assert 10 <= commands.last_step(tmp_path) < 100


def test_a_run_that_ends_before_the_step_is_not_signalled(script: None, tmp_path: Path) -> None:
    assert commands.run_and_stop([str(tmp_path), "3"], tmp_path, stop_at=10) == commands.DONE


def test_the_last_step_is_read_past_a_line_that_is_being_written(tmp_path: Path) -> None:
    assert commands.last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 7}) + "\n" + '{"step": 1')
    assert commands.last_step(tmp_path) == 7


def test_jobs_run_side_by_side_and_each_gives_its_exit_code(script: None, tmp_path: Path) -> None:
    jobs = []
    for name, steps in (("a", "5"), ("b", "not a number")):
        run = tmp_path / name
        jobs.append(Job(name, (str(run), steps), run, 5))
    codes = commands.run_side_by_side(jobs, threads=1)
    assert codes == [0, 1]
    assert "ValueError" in (tmp_path / "b" / "output.log").read_text()


def test_a_failed_command_is_named_with_its_code() -> None:
    with pytest.raises(UserError, match="export ended with exit code 3, expected 0"):
        commands.check(3, "export")


def test_a_job_tells_its_steps_and_its_best_validation_score(tmp_path: Path) -> None:
    job = Job("a", (), tmp_path, 100)
    assert job.progress() == (0, "")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 40}) + "\n")
    (tmp_path / "validation.json").write_text(json.dumps([{"step": 20, "top1": 0.5}, {"step": 40, "top1": 0.4}]))
    assert job.progress() == (40, "best validation top-1 0.500")


def test_the_batch_is_shared_in_whole_pairs_by_as_many_devices_as_can() -> None:
    assert [ranks_for(n, 128) for n in range(1, 9)] == [1, 2, 2, 4, 4, 4, 4, 8]


def test_a_demo_that_is_asked_to_stop_stops_its_stage_too(tmp_path: Path) -> None:
    child = tmp_path / "run.py"
    child.write_text(textwrap.dedent(RUN))
    parent = tmp_path / "demo.py"
    parent.write_text(
        textwrap.dedent(
            f"""
            import sys
            import pretrain.demo
            from pretrain.demo import commands
            commands.internimage = lambda arguments: [sys.executable, {str(child)!r}, *arguments]
            pretrain.demo.walk = lambda output: commands.run_and_stop([str(output), "3000"], output, stop_at=3000)
            from launch.cli import run
            sys.exit(run(["demo", "--output", sys.argv[1]]))
            """
        )
    )
    demo = subprocess.Popen([sys.executable, str(parent), str(tmp_path)], stderr=subprocess.PIPE, text=True)
    while commands.last_step(tmp_path) < 5:
        assert demo.poll() is None
        time.sleep(0.05)
    demo.terminate()
    said = demo.communicate()[1]
    assert demo.returncode == STOPPED and "the same command goes on" in said
    reached = commands.last_step(tmp_path)
    time.sleep(0.5)
    assert commands.last_step(tmp_path) == reached
