"""What the tasks of a run know of hosts together, through files in the run's folder: turns at a host, and robots.txt.

OUTPUT/.hosts/turns              one byte range a host, a byte of it a turn: locked by the task whose request runs. Byte
                                 locks hold between machines on NFS, and the kernel frees those of a task that died
       robots/3f/a2.jsonl        what servers answered, one a line; the server's hash names the file

No task waits for another but at a host that is busy, and none has to be there for the others.
"""

import errno
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.preparation.fetching import robots
from data_pipeline.preparation.fetching.robots import Robots

HOSTS_FOLDER = ".hosts"
_MOST_TURNS = 64  # bytes of a host's range
_KEPT_SECONDS = 24 * 3600  # RFC 9309, section 2.4: longer ago does not count
_KEPT_CHARACTERS = 65_536  # longer rules each task reads for itself
_BUSY = {errno.EACCES, errno.EAGAIN}


class NoLocksError(OSError):
    """The file system of the run has no locks on bytes of a file."""


class SharedHosts:
    """per_host: turns at a host that all tasks have together. token: the product token that rules are kept for.

    Every task of a run gives the same values. Raises NoLocksError where the folder's file system cannot lock.
    """

    def __init__(self, folder: Path, per_host: int, token: str) -> None:
        self._folder, self._token = folder, token
        self._turns = range(min(per_host, _MOST_TURNS))
        self._mine: set[int] = set()  # bytes that this process has locked: to itself, the kernel would give them again
        self._guard = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / "turns", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self.give(self._taken(0))
        except OSError as error:
            os.close(self._file)
            raise NoLocksError(*error.args) from None

    def take(self, host: str) -> int | None:
        """Takes a turn at a host, for `give`; None where all of its turns are taken."""
        first = int.from_bytes(hashlib.sha256(host.encode()).digest()[:7], "big") * _MOST_TURNS
        for turn in self._turns:
            if (taken := self._taken(first + turn)) is not None:
                return taken
        return None

    def give(self, taken: int | None) -> None:
        """Gives a turn back."""
        if taken is not None:
            with self._guard:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, taken)
                self._mine.discard(taken)

    def robots(self, origin: str) -> Robots | None:
        """Returns what a task has lately read of a server's robots.txt; None where none has."""
        found = None
        with suppress(FileNotFoundError), open(self._path(origin), encoding="utf-8") as file:
            for line in file:
                with suppress(ValueError, KeyError, TypeError):  # of a task that was killed while it wrote
                    said = json.loads(line)
                    if (said["origin"], said["token"]) == (origin, self._token) and _is_fresh(said["at"]):
                        rules = said["rules"]
                        found = robots.NOTHING if rules is None else Robots(tuple((str(a), bool(b)) for a, b in rules))
        return found

    def keep_robots(self, origin: str, found: Robots) -> None:
        """Tells the other tasks what a server answered."""
        if sum(len(pattern) for pattern, _ in found.rules) > _KEPT_CHARACTERS:
            return
        rules = None if found is robots.NOTHING else found.rules
        line = json.dumps({"origin": origin, "token": self._token, "at": time.time(), "rules": rules})
        path = self._path(origin)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as file:
            os.write(file, f"\n{line}\n".encode())

    def close(self) -> None:
        os.close(self._file)

    def _taken(self, byte: int) -> int | None:
        with self._guard:
            if byte in self._mine:
                return None
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except OSError as error:
                if error.errno in _BUSY:
                    return None
                raise
            self._mine.add(byte)
            return byte

    def _path(self, origin: str) -> Path:
        name = hashlib.sha256(origin.encode()).hexdigest()
        return self._folder / "robots" / name[:2] / f"{name[2:4]}.jsonl"


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Yields a file to append to, alone; on NFS, taking the lock also brings what others have appended."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _is_fresh(at: float) -> bool:
    return abs(time.time() - at) < _KEPT_SECONDS
