"""Whole files or none, and locks, also where the file system has no flock."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline import durable
from data_pipeline.durable import atomic_path, file_lock, write_durably

ROOT = Path(__file__).resolve().parents[2]


def test_a_writer_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    write_durably(tmp_path / "a.json", "old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
    write_durably(tmp_path / "a.json", "né".encode())
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "né"


HOLD = """
import errno, fcntl, sys, time
from pathlib import Path
from data_pipeline.durable import file_lock
def none(file, operation): raise OSError(errno.ENOSYS, "no flock")
if sys.argv[2] == "without": fcntl.flock = none
with file_lock(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["with", "without"])
def flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With flock, and as on a file system that has none."""

    def none(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "no flock")

    if request.param == "without":
        monkeypatch.setattr(fcntl, "flock", none)
    return str(request.param)


def test_one_process_holds_a_lock_until_it_is_killed(tmp_path: Path, flock: str) -> None:
    lock, beats = tmp_path / "lock", list[int]()
    command = [sys.executable, "-c", HOLD, str(lock), flock]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    with file_lock(lock, wait=False) as mine:
        assert not mine
    holder.kill()
    holder.communicate()
    if flock == "without":  # nobody can tell a killed holder from a slow one before its time is over
        with file_lock(lock, wait=False) as mine:
            assert not mine
        old = time.time() - 301
        os.utime(tmp_path / "lock.held", (old, old))
    with file_lock(lock, heartbeat=lambda: beats.append(1)) as mine:
        assert mine
        with file_lock(lock, wait=False) as again:
            assert not again
    with file_lock(lock, wait=False) as mine:
        assert mine
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"] and not beats


def test_a_holder_without_flock_keeps_its_lock_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_TOUCH_SECONDS", 0.05)
    monkeypatch.setattr(durable, "_ABANDONED_SECONDS", 0.5)

    def none(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with file_lock(tmp_path / "lock") as mine:
        assert mine
        time.sleep(1)
        with file_lock(tmp_path / "lock", wait=False) as other:
            assert not other


def test_other_faults_of_the_file_system_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: int, operation: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="input/output"), file_lock(tmp_path / "lock"):
        pass
