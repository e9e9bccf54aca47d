"""A thread that notices that nothing happens any more.

It counts its own ticks instead of comparing clocks: a jump of the clock, a suspended machine or a stopped process is
not a hang. A thread of Python's cannot run while other code keeps the interpreter's lock; for that case a timer of
faulthandler's, which needs no lock, writes the stacks a little later. It ends nothing: the ranks that wait do.
"""

import contextlib
import faulthandler
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from data_pipeline.errors import HANG
from pretrain.training.logging.kinds import EventKind

TICK_SECONDS = 1.0
START_UP_SECONDS = 600.0  # imports, building, reading a checkpoint
GRACE_EXCEEDED = 143  # as a lost node: the scheduler runs the command again, from the checkpoint before
LINGER_TICKS = 4


class Watchdog:
    """`heartbeat()` when training begins and at every step boundary. Without one for `hang_seconds` (before the first
    one: START_UP_SECONDS, where that is longer): all stacks to a file, `report`, exit 5.

    Once `stop_requested()` is true, the grace runs: without `close()` for `grace_seconds` the process leaves with 143.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        hang_seconds: float,
        grace_seconds: float,
        report: Callable[[EventKind, str], None],
        stop_requested: Callable[[], bool],
        leave: Callable[[int], None] = os._exit,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        self._stacks = folder / f"stacks-rank-{rank:05d}.txt"
        self._hang, self._grace = hang_seconds, grace_seconds
        self._limit = max(hang_seconds, START_UP_SECONDS)
        self._report, self._leave, self._tick = report, leave, tick_seconds
        self._stop_requested = stop_requested
        self._quiet = self._stopping_for = 0.0
        self._closed = threading.Event()
        self._file: TextIO | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> "Watchdog":
        self._file = open(self._stacks, "a", encoding="utf-8")  # noqa: SIM115  faulthandler needs it open
        self._arm()
        self._thread.start()
        return self

    def _arm(self) -> None:
        if self._file is not None:
            later = self._limit + 2 * LINGER_TICKS * self._tick
            faulthandler.dump_traceback_later(later, file=self._file)

    def heartbeat(self) -> None:
        self._quiet, self._limit = 0.0, self._hang
        self._arm()

    def still_starting(self) -> None:
        """What comes before training takes long, but goes on: the indexing of a large set."""
        self._quiet = 0.0
        self._arm()

    def close(self) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):
                if self._stacks.stat().st_size == 0:
                    self._stacks.unlink()

    def _watch(self) -> None:
        while not self._closed.wait(self._tick):
            self._quiet += self._tick
            if self._stop_requested():
                self._stopping_for += self._tick
                if self._stopping_for > self._grace:
                    self._dump(
                        EventKind.GRACE_EXCEEDED, f"no checkpoint within the grace of {self._grace:g} s", GRACE_EXCEEDED
                    )
                    return
            if self._quiet > self._limit:
                self._dump(EventKind.HANG, f"no step ended for {self._limit:g} s", HANG)
                return

    def _record_flight(self) -> None:
        """NCCL's flight recorder, where it runs: the last collectives of this rank, which of them began and ended."""
        with contextlib.suppress(Exception):  # whatever it lacks, the stacks are there
            from torch._C import _distributed_c10d as c10d

            trace = c10d._dump_nccl_trace_json()  # type: ignore[attr-defined]
            if trace and b"entries" in trace:
                (self._stacks.parent / self._stacks.name.replace("stacks", "nccl")).with_suffix(".json").write_bytes(
                    trace
                )

    def _dump(self, kind: EventKind, message: str, code: int) -> None:
        try:
            with open(self._stacks, "a", encoding="utf-8") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
            self._record_flight()
            self._report(kind, f"{message}; stacks of all threads in {self._stacks}")
            # The others hang in the same collective and are about to notice: one that leaves first breaks their
            # connection, and they would end with a network error instead of their stacks.
            self._closed.wait(LINGER_TICKS * self._tick)
        finally:
            self._leave(code)
