"""Two ranks that stay, so that a test that only wants a run by two ranks does not pay for the imports of a start.

    the test  -- a line {"work", "environment", "log", "reply"} a job, to each rank's input -->  the ranks run it
              <-- REPLY.RANK holds the exit code, once that rank is done --

After an end that is neither 0 nor 75 the ranks are ended, and the next job starts new ones. Tests that kill or signal
ranks start their own (training_fakes.start_ranks).
"""

import atexit
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GOOD = (0, 75)
AFTER_THE_FIRST = 10.0  # seconds that the other rank has once one has failed, as under a launcher


class WarmRanks:
    """start: (words of the command, log) -> the processes, which read jobs from their input."""

    def __init__(self, start: Callable[[Sequence[str]], list["subprocess.Popen[str]"]]) -> None:
        self._start = start
        self._ranks: list[subprocess.Popen[str]] = []
        self._jobs = itertools.count()
        atexit.register(self.end)

    def run(self, work: Sequence[str], output: Path, environment: dict[str, str], timeout: float) -> list[int]:
        """work: pairs of a configuration's file and a run's folder. The ranks' exit codes."""
        if not self._ranks or any(rank.poll() is not None for rank in self._ranks):
            self.end()
            self._ranks = self._start(["--serve"])
        reply = output.parent / f".{output.name}-{next(self._jobs)}"
        for number, rank in enumerate(self._ranks):
            log = output.parent / f"{output.name}-rank{number}.log"
            job = {"work": list(work), "environment": environment, "log": str(log), "reply": f"{reply}.{number}"}
            assert rank.stdin is not None
            print(json.dumps(job), file=rank.stdin, flush=True)
        codes = self._wait(reply, time.monotonic() + timeout)
        if any(code not in GOOD for code in codes):
            self.end()
        return codes

    def _wait(self, reply: Path, deadline: float) -> list[int]:
        codes: list[int | None] = [None] * len(self._ranks)
        failed_at = None
        while None in codes and (failed_at is None or time.monotonic() < failed_at + AFTER_THE_FIRST):
            for number, rank in enumerate(self._ranks):
                answer = Path(f"{reply}.{number}")
                if codes[number] is None:
                    ended = rank.poll()  # before the look at the answer, which may have come meanwhile
                    codes[number] = int(answer.read_text()) if answer.exists() else ended
            if failed_at is None and any(code not in (None, *GOOD) for code in codes):
                failed_at = time.monotonic()
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return [-9 if code is None else code for code in codes]

    def end(self) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
        self._ranks = []


def run_all(work: Sequence[str]) -> int:
    """work: pairs of a configuration's file and a run's folder. The exit code of the last run, or of one that fails."""
    import yaml

    from data_pipeline.errors import UserError
    from pretrain.configuration import parse_config
    from pretrain.training import run

    code = 0
    try:
        for described, where in zip(work[::2], work[1::2], strict=True):
            chosen = parse_config(yaml.safe_load(Path(described).read_text()))
            if (code := run(chosen, where)) not in (0, 75):
                break
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return code


def serve() -> None:
    """A rank's life: job after job, until its input ends or a job does not end well."""
    for name in [name for name in os.environ if name.startswith("FAKE_")]:  # of the test that started it
        del os.environ[name]
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log, stream.fileno())
        os.close(log)
        os.environ.update(job["environment"])
        try:
            code = run_all(job["work"])
        except Exception:
            traceback.print_exc()
            code = 1
        for name in job["environment"]:
            del os.environ[name]
        partial = Path(f"{job['reply']}.partial")
        partial.write_text(str(code))
        partial.rename(job["reply"])
        if code not in GOOD:
            os._exit(code)
