"""Maps a function over many items in several processes: results in the order of the items, memory bounded."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from data_pipeline.executors.parent import WorkerContext, end_with_parent

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_CHUNK = 16  # items a message: enough to hide the pipe, few enough to share the work evenly


def available() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    work: Callable[[_Item], _Result], items: Iterable[_Item], workers: int, *, chunk: int = _CHUNK
) -> Iterator[_Result]:
    """Maps over `workers` processes (one: this process); at most 4 chunks of items a process are under way.

    Fresh processes are started, not forks: a caller that trains has threads already, and a fork copies half of them.
    (So a script that calls this needs its `if __name__ == "__main__":`.)
    """
    if workers <= 1:
        yield from map(work, items)
        return
    source = iter(items)
    with ProcessPoolExecutor(workers, mp_context=WorkerContext(), initializer=end_with_parent) as pool:
        waiting: deque[Future[list[_Result]]] = deque()
        try:
            while True:
                while len(waiting) < 4 * workers and (items_now := list(itertools.islice(source, chunk))):
                    waiting.append(pool.submit(_each, work, items_now))
                if not waiting:
                    return
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _each(work: Callable[[_Item], _Result], chunk: list[_Item]) -> list[_Result]:
    return [work(item) for item in chunk]
