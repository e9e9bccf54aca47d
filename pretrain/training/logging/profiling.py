"""A profiler window: `training.profile: "10:13"` traces steps 10, 11 and 12 of every rank into Chrome's format."""

from pathlib import Path
from typing import Any


class Profiler:
    """`step(n)` when n steps are done; steps first .. last - 1 (counted from 0) are traced. n may leap: steps are
    skipped, and a run may resume inside the window.
    """

    def __init__(self, window: str | None, run: Path, rank: int) -> None:
        self._first, self._last = (int(part) for part in window.split(":")) if window else (-1, -1)
        self._path = run / f"trace-rank-{rank:05d}.json"
        self._active: Any = None
        self._closed = False

    def step(self, done: int) -> None:
        if self._first <= done < self._last and self._active is None and not self._closed:
            from torch.profiler import profile

            self._active = profile()
            self._active.start()
        elif done >= self._last:
            self.close()

    def close(self) -> None:
        if self._active is not None:
            self._active.stop()
            self._active.export_chrome_trace(str(self._path))
            self._active, self._closed = None, True
