"""Commands as a user would type them, run as child processes and watched through the files that they write."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DONE, UserError

POLL_SECONDS = 0.5
SAY_SECONDS = 15.0


def internimage(arguments: Sequence[str]) -> list[str]:
    """The command line of `internimage ARGUMENTS` in this interpreter."""
    return [sys.executable, "-m", "launch", *arguments]


def check(code: int, what: str, expected: int = DONE) -> None:
    if code != expected:
        raise UserError(f"{what} ended with exit code {code}, expected {expected}; the lines above say why")


def last_step(run: Path) -> int:
    """The newest step in RUN/metrics.jsonl; 0 where there is none yet."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):  # the line that is being written
            continue
    return 0


def run_and_stop(arguments: Sequence[str], run: Path, stop_at: int) -> int:
    """Run a command, ask it to stop (SIGTERM) once `run` has logged step `stop_at`, and return its exit code."""
    child = subprocess.Popen(internimage(arguments))
    try:
        while child.poll() is None and last_step(run) < stop_at:
            time.sleep(POLL_SECONDS)
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        return child.wait()
    finally:
        _end(child)


@dataclass(frozen=True)
class Job:
    """One of several commands run side by side. `run` is its run directory, `steps` the most it can take."""

    title: str
    arguments: tuple[str, ...]
    run: Path
    steps: int

    def progress(self) -> tuple[int, str]:
        """Steps taken, and the best validation score so far."""
        try:
            history = json.loads((self.run / "validation.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            history = []
        best = max((entry["top1"] for entry in history), default=None)
        return last_step(self.run), "" if best is None else f"best validation top-1 {best:.3f}"


def run_side_by_side(jobs: Sequence[Job], threads: int) -> list[int]:
    """Run the jobs at once with `threads` threads each; a bar a job, output to RUN/output.log. Their exit codes."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    children: list[subprocess.Popen[bytes]] = []
    try:
        for job in jobs:
            job.run.mkdir(parents=True, exist_ok=True)
            with (job.run / "output.log").open("ab") as log:
                command = internimage(job.arguments)
                children.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        _show(jobs, children)
        return [child.wait() for child in children]
    finally:
        for child in children:
            _end(child)


def _show(jobs: Sequence[Job], children: Sequence["subprocess.Popen[bytes]"]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal
    ) as bars:
        tasks = [bars.add_task(job.title, total=job.steps, note="") for job in jobs]
        said = time.monotonic()
        while any(child.poll() is None for child in children):
            time.sleep(POLL_SECONDS)
            for job, task in zip(jobs, tasks, strict=True):
                step, note = job.progress()
                bars.update(task, completed=step, note=note)
            if not console.is_terminal and time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                for job in jobs:
                    step, note = job.progress()
                    print(f"{job.title}: step {step} of at most {job.steps}  {note}", file=sys.stderr, flush=True)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """After a failure or Ctrl-C: let a child save, then be gone."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
