"""Processes that decode images, any of which may be killed by an image: that image is found, and the rest goes on.

A decoder that crashes (signal 11) or is killed for its memory (signal 9) breaks its whole pool. What was under way is
then done again one item at a time, each in a process of its own; the item whose process dies is given up.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from typing import TypeVar

from data_pipeline.executors.parent import WorkerContext, end_with_parent

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_CHUNK = 16  # items a message: enough to hide the pipe, few enough to share the work evenly


def surviving_map(
    work: Callable[[_Item], _Result],
    items: Iterable[_Item],
    workers: int,
    given_up: Callable[[_Item], _Result],
    *,
    chunk_size: int = _CHUNK,
) -> Iterator[_Result]:
    """Maps over `workers` processes, in the order of the items, at most 4 chunks a process under way.

    `given_up` makes the result of an item that kills its process. With one worker the work is done in this process,
    which such an item kills.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    source = iter(items)
    pool = _pool(workers)
    waiting: deque[tuple[list[_Item], Future[list[_Result]]]] = deque()
    try:
        while True:
            while len(waiting) < 4 * workers and (chunk := list(itertools.islice(source, chunk_size))):
                waiting.append((chunk, _submit(pool, partial(_each, work), chunk)))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            try:
                results = future.result()
            except BrokenProcessPool:
                pool.shutdown(wait=False)
                results = _one_by_one(work, chunk, given_up)
                waiting = deque((one, _settled(work, one, left, given_up)) for one, left in waiting)
                pool = _pool(workers)
            yield from results
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=WorkerContext(), initializer=end_with_parent)


def _submit(pool: ProcessPoolExecutor, work: Callable[[_Item], _Result], item: _Item) -> Future[_Result]:
    """Submits; a pool that broke meanwhile gives a future that says so."""
    try:
        return pool.submit(work, item)
    except BrokenProcessPool as error:
        broken: Future[_Result] = Future()
        broken.set_exception(error)
        return broken


def _settled(
    work: Callable[[_Item], _Result],
    chunk: list[_Item],
    future: Future[list[_Result]],
    given_up: Callable[[_Item], _Result],
) -> Future[list[_Result]]:
    """Returns a chunk's results of a pool that broke: those that were there, or made one item at a time."""
    with suppress(BrokenProcessPool):
        future.result()  # a broken pool ends all that it had
        return future
    done: Future[list[_Result]] = Future()
    done.set_result(_one_by_one(work, chunk, given_up))
    return done


def _one_by_one(
    work: Callable[[_Item], _Result], chunk: list[_Item], given_up: Callable[[_Item], _Result]
) -> list[_Result]:
    results: list[_Result] = []
    single = _pool(1)
    for item in chunk:
        _submit(single, _ready, work).result()
        try:
            results.append(_submit(single, work, item).result())
        except BrokenProcessPool:
            results.append(given_up(item))
            single.shutdown(wait=False)
            single = _pool(1)
    single.shutdown(wait=False)
    return results


def _ready(work: object) -> bool:
    """Tells that a process lives and knows `work`: where it does not, no item is to blame, and the error is raised."""
    return callable(work)


def _each(work: Callable[[_Item], _Result], chunk: list[_Item]) -> list[_Result]:
    return [work(item) for item in chunk]
