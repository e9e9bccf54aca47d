"""Takes turns: how many requests run at a time, and how many bytes of their answers are held.

A request that has waited for its server for longer than `patience` steps aside, into a lane of its own: silent servers
then do not take the places of those that answer.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_SLOW_LANE = 8  # times as many requests wait aside as run


class Turns:
    """Lets `count` requests run at a time."""

    def __init__(self, count: int, patience: float) -> None:
        self._running = asyncio.Semaphore(count)
        self._patience, self._room_aside = patience, _SLOW_LANE * count

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for a turn and holds it until the block ends, or until the request steps aside."""
        await self._running.acquire()
        aside = False

        def step_aside() -> None:
            nonlocal aside
            if self._room_aside > 0:  # else the request keeps its place: sockets are bounded, too
                aside = True
                self._room_aside -= 1
                self._running.release()

        timer = asyncio.get_running_loop().call_later(self._patience, step_aside)
        try:
            yield
        finally:
            timer.cancel()
            if aside:
                self._room_aside += 1
            else:
                self._running.release()


class ByteBudget:
    """Bytes held at a time, at most `size`; who asks for more than that gets all of it, alone."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._waiting: list[asyncio.Future[None]] = []

    async def acquire(self, count: int) -> int:
        """Waits until `count` bytes are free and takes them; returns how many were taken."""
        count = min(count, self._size)
        while self._free < count:
            change = asyncio.get_running_loop().create_future()
            self._waiting.append(change)
            await change
        self._free -= count
        return count

    def release(self, count: int) -> None:
        if count:
            self._free += count
            waiting, self._waiting = self._waiting, []
            for change in waiting:
                if not change.done():  # else its caller was cancelled
                    change.set_result(None)
