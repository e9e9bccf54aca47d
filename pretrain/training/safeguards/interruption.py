"""Requests to stop. A handler only sets a flag; the loop reads it at the step boundary, where all ranks agree and save.

SIGTERM, SIGUSR1, SIGINT, SIGHUP, a file named `stop` in the run directory, or `training.stop_after`  -> save, exit 75
SIGHUP (a lost terminal) stays ignored where it was, as under nohup
USR1 followed by TERM (what Slurm sends) is one request
a second Ctrl-C 2 s or more after the first one  -> leave at once, 130 (one Ctrl-C may reach a rank twice)
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Self

REPEAT_SECONDS = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
STOP_FILE = "stop"


class Interruption:
    """Enter as early as possible: a signal during start-up is then kept until the first step boundary."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, leave: Callable[[int], None] = os._exit) -> None:
        self.reason: str | None = None
        self._clock = clock
        self._leave = leave
        self._first_interrupt: float | None = None
        self._previous: dict[int, object] = {}
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def request(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason

    def read_stop_file(self, run: Path) -> None:
        if (run / STOP_FILE).exists():
            self.request("stop file")
            self.reason = "stop file"  # also beside a signal, after which Slurm would start the run again

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked data worker: its parent decides
            return
        if number == signal.SIGINT:
            now = self._clock()
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt >= REPEAT_SECONDS:
                self._leave(130)
        self.request(signal.Signals(number).name)
