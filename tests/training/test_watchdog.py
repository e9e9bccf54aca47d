"""A hang is told from a jump of the clock, and its stacks are written whoever holds the interpreter."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.training.safeguards.watchdog import Watchdog


def test_the_watchdog_tells_a_hang_from_a_jump_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    said: list[str] = []

    def make(hang: float, grace: float = 100.0, stop_requested: bool = False) -> Watchdog:
        say = lambda kind, text: said.append(kind)  # noqa: E731
        return Watchdog(tmp_path, 0, hang, grace, say, lambda: stop_requested, left.append, tick_seconds=0.01)

    quiet = make(100.0).start()
    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    time.sleep(0.1)
    quiet.close()
    assert left == []
    hung = make(0.05).start()
    hung.heartbeat()  # before the first heartbeat it is start-up, which may take longer
    hung._thread.join(5)
    assert left == [5] and said == ["hang"]
    assert "test_the_watchdog" in (tmp_path / "stacks-rank-00000.txt").read_text()
    slow = make(100.0, grace=0.05, stop_requested=True).start()
    slow._thread.join(5)
    assert left == [5, 143] and said == ["hang", "grace_exceeded"]


def test_a_run_that_ends_well_leaves_no_file_of_stacks_and_one_that_hung_keeps_its_own(tmp_path: Path) -> None:
    def start() -> Watchdog:
        return Watchdog(tmp_path, 0, 100.0, 100.0, lambda kind, text: None, lambda: False, tick_seconds=0.01).start()

    start().close()
    stacks = tmp_path / "stacks-rank-00000.txt"
    assert not stacks.exists()
    stacks.write_text("of the run before")
    start().close()
    assert stacks.read_text() == "of the run before"


HOLDS_THE_LOCK = """
import ctypes, sys
from pathlib import Path
from pretrain.training.safeguards.watchdog import Watchdog

def stuck_in_foreign_code():
    ctypes.PyDLL(None).sleep(3)  # PyDLL, unlike CDLL, keeps the interpreter's lock

def left(code):
    raise SystemExit("the thread could not have run")

quiet = lambda kind, text: None
watchdog = Watchdog(Path(sys.argv[1]), 0, 0.2, 100.0, quiet, lambda: False, left, tick_seconds=0.05).start()
watchdog.heartbeat()
stuck_in_foreign_code()
watchdog.close()
"""


def test_stacks_are_written_while_foreign_code_keeps_the_interpreter(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path)], cwd=Path(__file__).parents[2], check=True, timeout=60
    )
    assert "stuck_in_foreign_code" in (tmp_path / "stacks-rank-00000.txt").read_text()
