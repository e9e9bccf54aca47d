"""Files that exist whole or not at all, digests of files, and locks that end with their holder.

FOLDER/.NAME.PID.partial     grows; fsync, rename to NAME, fsync of FOLDER
       LOCK                  flock, which the kernel frees when the holder ends
       LOCK.held             in place of flock where the file system has none
"""

import errno
import fcntl
import hashlib
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_pipeline.callbacks import Heartbeat

TEMPORARY = ".partial"
_LONGEST_PAUSE = 0.1  # seconds between two tries to take a lock
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_TOUCH_SECONDS, _ABANDONED_SECONDS = 15.0, 300.0  # network file systems cache times for up to a minute


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_path(path: Path) -> Path:
    """Returns where `path` grows until it is whole: same folder (for an atomic rename), one name a process."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a path to write. The file takes the name `path` where the block ends without an error, else vanishes."""
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write; it takes the name `path` when the block ends without an error, and vanishes otherwise."""
    with atomic_path(path) as temporary, open(temporary, "wb", buffering=1 << 20) as file:
        yield file


def write_durably(path: Path, content: bytes | str) -> None:
    """Writes `content` (text as UTF-8) under `path`, whole or not at all, also after a power cut."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> int:
    """Deletes what a killed writer left in `folder`; returns how many files. Call only while nobody writes there."""
    left = [path for path in folder.glob(f".*{TEMPORARY}") if path.is_file()]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


@contextmanager
def file_lock(
    path: Path, *, wait: bool = True, patience: float = math.inf, heartbeat: Heartbeat | None = None
) -> Iterator[bool]:
    """Yields whether the lock was taken, which is always so with `wait`; holds it until the block or the process ends.
    patience: seconds after which waiting is given up.

    Where the file system has no flock, the holder makes LOCK.held and touches it every 15 s; one that is untouched for
    five minutes is taken over. `heartbeat` is called while this waits. Raises OSError where `path` cannot be written.
    """
    pause, deadline = 0.001, time.monotonic() + patience
    with open(path, "a") as file:
        while (release := _try_lock(file.fileno(), path)) is None:
            if not wait or time.monotonic() > deadline:
                yield False
                return
            if heartbeat is not None:
                heartbeat()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        try:
            yield True
        finally:
            release()


def _try_lock(file: int, path: Path) -> Callable[[], None] | None:
    """Returns the function that releases the lock, None where another process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        held = path.with_name(f"{path.name}.held")
        return _hold(held) or (_hold(held) if _removed_abandoned(held) else None)
    return lambda: fcntl.flock(file, fcntl.LOCK_UN)  # closing does not unlock a descriptor that a fork copied


def _hold(held: Path) -> Callable[[], None] | None:
    mine, ended = uuid.uuid4().hex, threading.Event()
    try:
        with open(held, "x") as file:
            file.write(mine)
    except FileExistsError:
        return None

    def touch() -> None:
        while not ended.wait(_TOUCH_SECONDS):
            with suppress(OSError):
                os.utime(held)

    def release() -> None:
        ended.set()
        with suppress(FileNotFoundError):
            if held.read_text() == mine:  # another process may have taken the lock over
                held.unlink()

    threading.Thread(target=touch, name="lock", daemon=True).start()
    return release


def _removed_abandoned(held: Path) -> bool:
    """Moves an abandoned LOCK.held out of the way. The file system's own clock decides, by a file touched now."""
    aside = temporary_path(held)
    with suppress(FileNotFoundError):
        found = held.stat()
        aside.touch()
        if aside.stat().st_mtime - found.st_mtime < _ABANDONED_SECONDS:
            aside.unlink()
            return False
        os.rename(held, aside)
        if aside.stat().st_mtime_ns != found.st_mtime_ns:  # another process has just taken the lock over
            os.rename(aside, held)
            return False
        aside.unlink()
    return True
