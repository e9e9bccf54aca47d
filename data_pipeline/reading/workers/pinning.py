"""Prepares one batch ahead in a thread, so that page-locking costs training no time."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

_T = TypeVar("_T")
_WAIT_SECONDS = 0.1


class Prefetcher(Generic[_T]):
    """`change(item)` for each of `items`, made in a thread while the one before is in use; errors come through in their
    place. `begin` is called first, in the thread. After `close`, and when whatever `items` waits for has ended, the
    thread ends."""

    def __init__(self, items: Iterator[_T], change: Callable[[_T], _T], begin: Callable[[], None]) -> None:
        self._items, self._change, self._begin = items, change, begin
        self._made: queue.Queue[tuple[_T | None, BaseException | None]] = queue.Queue(1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="pinning", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_T]:
        while True:
            item, error = self._made.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
            del item

    def close(self) -> None:
        self._closed.set()

    def _work(self) -> None:
        try:
            self._begin()
            for item in self._items:
                if not self._put((self._change(item), None)):
                    return
                del item
            self._put((None, None))
        except BaseException as error:
            self._put((None, error))

    def _put(self, made: tuple[_T | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._made.put(made, timeout=_WAIT_SECONDS)
                return True
            except queue.Full:
                continue
        return False


def pinned_prefetcher(items: Iterator[_T], pin: Callable[[_T], _T]) -> Prefetcher[_T]:
    """Pins on the device of the calling thread; otherwise every rank would make a context on the first GPU."""
    device = torch.cuda.current_device()
    return Prefetcher(items, pin, lambda: torch.cuda.set_device(device))
