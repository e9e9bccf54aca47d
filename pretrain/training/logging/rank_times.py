"""How long each rank takes by itself, so that a slow one is named: in a synchronous step all ranks are as slow as it.

own time: from the start of a step to the end of its last forward pass, on the device, without waiting for data
wait:     for data
"""

import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pretrain.training.distributed import DistributedContext

SLOW = 1.25  # times the median over ranks


class RankTimes:
    """`started`, `waiting`, `computing`, `forwarded` in each step; `collect` where a step is logged. report: takes one
    sentence for each rank that is slow.
    """

    def __init__(self, context: DistributedContext, report: Callable[[str], None]) -> None:
        self._context, self._report = context, report
        self._cuda = context.device.type == "cuda"
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start, self._own, self._wait, self._steps = 0.0, 0.0, 0.0, 0
        self._waited_in_step = 0.0
        self._named: set[str] = set()

    def started(self) -> None:
        self._waited_in_step = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited_in_step += time.perf_counter() - start

    def computing(self) -> None:
        """A micro-batch is there: its work on the device begins."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self._marks.append((begin, end))

    def forwarded(self, *, last: bool) -> None:
        """A forward pass is enqueued (on a CPU: done). last: of the step."""
        if self._cuda:
            self._marks[-1][1].record()
        if last:
            if not self._cuda:
                self._own += time.perf_counter() - self._start - self._waited_in_step
            self._wait += self._waited_in_step
            self._steps += 1

    def collect(self) -> dict[str, float]:
        """Since the last call, by rank: the slowest and the median, in ms a step. Collective."""
        own = (
            sum(begin.elapsed_time(end) for begin, end in self._marks if end.query()) if self._cuda else 1e3 * self._own
        )
        steps = max(1, self._steps)
        mine = own / steps, 1e3 * self._wait / steps, socket.gethostname()
        self._marks, self._own, self._wait, self._steps = [], 0.0, 0.0, 0
        if self._context.world_size == 1:
            return {}
        everybody = self._context.gather(mine)
        found: dict[str, float] = {}
        for place, name, what in ((0, "rank", "computes"), (1, "data", "waits for data")):
            times = [float(rank[place]) for rank in everybody]
            slowest, median = max(range(len(times)), key=times.__getitem__), statistics.median(times)
            found |= {f"slowest_{name}_ms": times[slowest], f"median_{name}_ms": median}
            found["slowest_rank" if name == "rank" else "slowest_data_rank"] = float(slowest)
            behind = times[slowest] - median
            if (
                self._context.leader
                and times[slowest] > SLOW * median
                and behind > 0.1 * statistics.median(float(rank[0]) for rank in everybody)
            ):
                self._say(slowest, str(everybody[slowest][2]), what, times[slowest], median)
        return found

    def _say(self, rank: int, host: str, what: str, its: float, median: float) -> None:
        key = f"{rank} {what}"
        if key not in self._named:
            self._named.add(key)
            self._report(
                f"rank {rank} on {host} {what} {its:.0f} ms a step, where the median over ranks is {median:.0f}"
            )
