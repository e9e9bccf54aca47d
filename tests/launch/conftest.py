"""Small programs that play the ranks: no torch, so that starting them takes milliseconds."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], list[str]]:
    """Python text -> the argument vector that runs it. `r` is the rank, `out` a folder to leave marks in."""

    def write(body: str) -> list[str]:
        head = "import os, sys, time, signal, pathlib\nr = int(os.environ['RANK'])\n"
        head += f"out = pathlib.Path({str(tmp_path)!r})\n"
        path = tmp_path / "rank.py"
        path.write_text(head + textwrap.dedent(body))
        return [sys.executable, "-S", str(path)]

    return write


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts `spawn(argv, n)` in a process of its own, which may be signalled; kills it at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(argv: list[str], processes: int, patience: str = "", options: str = "") -> "subprocess.Popen[str]":
        code = (
            "import sys; from launch.local import spawn; from launch.supervision import Patience\n"
            f"sys.exit(spawn({argv!r}, {processes}, patience=Patience({patience}), {options}))"
        )
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def wait_for() -> Callable[..., None]:
    def wait(condition: Callable[[], object], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition was not met in time"
            time.sleep(0.02)

    return wait


@pytest.fixture
def alive() -> Callable[[int], bool]:
    """Running, and no zombie."""

    def look(process: int) -> bool:
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
        except (FileNotFoundError, ProcessLookupError):
            return False

    return look


@pytest.fixture
def fake_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script of that name before everything else on the PATH."""
    folder = tmp_path / "fake-bin"

    def make(name: str, body: str) -> None:
        folder.mkdir(exist_ok=True)
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return make
