"""Work units of a run that any number of processes and machines share: claimed through the file system, done once.

    FOLDER/.units/00012.lock    held by whoever works on unit 12; the kernel frees it when the holder dies

Whether a unit is done is told by what it has written, not by a mark of its own. So it makes no difference who did which
unit, or how often one was begun.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.durable import file_lock
from data_pipeline.errors import StoppedError, UserError
from data_pipeline.executors.processes import available, ordered_map

UNITS_FOLDER = ".units"
Executor = Literal["processes", "ray"]
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Unit(Protocol):
    """Work on one unit, by its number; must be picklable. Calling it on a unit that is done does nothing."""

    def __call__(self, number: int) -> None: ...


@dataclass(frozen=True)
class Part:
    """The `index`-th of `count` parts of a run, from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Reads `3/8`, the third of eight. Raises UserError."""
        index, slash, count = text.partition("/")
        if not slash or not index.isdecimal() or not count.isdecimal() or not 1 <= int(index) <= int(count):
            raise UserError(f"part {text!r}: expected I/N with 1 <= I <= N, as 3/8")
        return cls(int(index) - 1, int(count))

    def units(self, total: int) -> range:
        """Returns the numbers of the part's units, one run of neighbours."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)


class _Noted:
    """Signal handler that notes that a stop was asked for, and passes it on to the one that it stands in for."""

    def __init__(self) -> None:
        self.asked = False
        self._outer = {int(number): signal.getsignal(number) for number in _SIGNALS}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        outer = self._outer[number]
        if isinstance(outer, _Noted):  # of the work that this is a part of: a scheduler asks once, for both
            outer(number, frame)

    def restore(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self._outer.items():
            signal.signal(number, handler)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether this process was asked to stop, by SIGUSR1 or SIGTERM; nested, all tell."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield lambda: False
        return
    noted = _Noted()
    for number in _SIGNALS:
        signal.signal(number, noted)
    try:
        yield lambda: noted.asked
    finally:
        noted.restore()


def run_units(
    work: Unit,
    folder: Path,
    total: int,
    done: Callable[[int], bool],
    *,
    part: Part | None = None,
    executor: Executor = "processes",
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> bool:
    """Does all units (or those of `part`) that are not done and that no other process works on; tells whether all are.

    A unit whose holder has died meanwhile is taken over. Raises StoppedError after the units under way where SIGUSR1 or
    SIGTERM asks for it: the same command goes on.
    """
    mine: Sequence[int] = range(total) if part is None else part.units(total)
    (folder / UNITS_FOLDER).mkdir(parents=True, exist_ok=True)
    claimed = partial(_claimed, work, folder)
    with stop_requests() as stopping:
        left = [number for number in mine if not done(number)]
        while left:
            finished = len(mine) - len(left)
            for count, _ in enumerate(_map(claimed, left, executor, workers), 1):
                if progress is not None:
                    progress(finished + count, len(mine))
                if stopping():
                    raise StoppedError(f"stopped after a unit of work, as asked; the same command goes on in {folder}")
            remaining = [number for number in mine if not done(number)]
            if len(remaining) == len(left):
                break  # others are working on these
            left = remaining
    return not any(not done(number) for number in range(total))


def _claimed(work: Unit, folder: Path, number: int) -> None:
    """Works on a unit unless somebody else does, or has done the last one meanwhile and cleared up."""
    try:
        with file_lock(folder / UNITS_FOLDER / f"{number:05d}.lock", wait=False) as mine:
            if mine:
                work(number)
    except FileNotFoundError:
        if (folder / UNITS_FOLDER).exists():
            raise


def _map(work: Unit, units: Sequence[int], executor: Executor, workers: int | None) -> Iterator[None]:
    if executor == "ray":
        from data_pipeline.executors.ray import ray_map

        return ray_map(work, units)
    return ordered_map(work, units, available() if workers is None else workers, chunk=1)
