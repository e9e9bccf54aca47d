"""Processes that decode images for callers that wait asynchronously, any of which may be killed by an image.

    event loop  <- socket ->  process         each has one item under way and one that waits

The event loop talks to the processes itself, for the threads and queues of a pool of `concurrent.futures` take half a
millisecond more of an image. Where a process dies (signal 11, or 9 for its memory), what it had is done again, one item
at a time, in a process of its own; an item whose process dies again is given up.
"""

import asyncio
import pickle
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Generic, Protocol, TypeVar, cast

from data_pipeline.executors.parent import WorkerContext
from data_pipeline.preparation.packing.decoding import SIZE, Answer, answer_items

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_In = TypeVar("_In", contravariant=True)
_Out = TypeVar("_Out", covariant=True)

_ITEMS_A_PROCESS = 2  # one under way, and one that it need not wait for


class DeadProcessError(Exception):
    """A process has ended before it answered."""


class Decoders(Protocol[_In, _Out]):
    """Does items for callers that wait asynchronously."""

    async def do(self, item: _In) -> _Out | None:
        """Returns the result, None for an item that kills its process."""


@asynccontextmanager
async def decoders(work: Callable[[_Item], _Result], workers: int) -> AsyncIterator[Decoders[_Item, _Result]]:
    """Opens processes that do `work`; with one worker it is a thread of this process, which an item can kill."""
    if workers > 1:
        pool = _Processes(work, workers)
        try:
            yield pool
        finally:
            pool.close()
    else:
        with ThreadPoolExecutor(1) as threads:
            yield _Thread(work, threads)


class _Thread(Generic[_Item, _Result]):
    def __init__(self, work: Callable[[_Item], _Result], threads: ThreadPoolExecutor) -> None:
        self._work, self._threads = work, threads

    async def do(self, item: _Item) -> _Result | None:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._work, item)


class _Processes(Generic[_Item, _Result]):
    """Deals items out to processes, and starts another in the place of one that dies."""

    def __init__(self, work: Callable[[_Item], _Result], workers: int) -> None:
        self._work = work
        self._processes: dict[int, _Process[_Item, _Result]] = {}  # each is started when it gets its first item
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for place in (*range(workers),) * _ITEMS_A_PROCESS:
            self._free.put_nowait(place)
        self._alone = asyncio.Semaphore(1)

    async def do(self, item: _Item) -> _Result | None:
        place = await self._free.get()
        try:
            with suppress(DeadProcessError):
                return await self._living(place).do(item)
        finally:
            self._free.put_nowait(place)
        async with self._alone:
            single: _Process[_Item, _Result] = _Process(self._work)
            try:
                with suppress(DeadProcessError):
                    return await single.do(item)
            finally:
                single.close()
        return None

    def close(self) -> None:
        for process in self._processes.values():
            process.close()

    def _living(self, place: int) -> "_Process[_Item, _Result]":
        process = self._processes.get(place)
        if process is None or process.is_dead:
            if process is not None:
                process.close()
            process = self._processes[place] = _Process(self._work)
        return process


class _Process(asyncio.Protocol, Generic[_Item, _Result]):
    """One process, which answers items in their order."""

    def __init__(self, work: Callable[[_Item], _Result]) -> None:
        self.is_dead = False
        loop = asyncio.get_running_loop()
        self._socket, theirs = socket.socketpair()
        self._process = WorkerContext().Process(target=answer_items, args=(theirs, work), daemon=True)
        with theirs:
            self._process.start()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._awaited: deque[asyncio.Future[Answer]] = deque([loop.create_future()])  # the first one says: ready
        self._started = loop.create_task(self._start(self._awaited[0]))

    async def do(self, item: _Item) -> _Result:
        """Returns the result of an item, or raises what the work raised. Raises DeadProcessError where the process died
        before it answered, RuntimeError where it could not even start."""
        transport = await asyncio.shield(self._started)
        if self.is_dead:
            raise DeadProcessError
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._awaited.append(answered)
        transport.write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
        answer = await answered
        if answer.error is not None:
            raise answer.error
        return cast(_Result, answer.result)

    def close(self) -> None:
        """Ends the process, whatever it does: all that it knows is what it was sent."""
        self._process.kill()
        self._process.join()
        self._started.cancel()
        if self._transport is not None:
            self._transport.abort()
        self._socket.close()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= SIZE.size:
            end = SIZE.size + SIZE.unpack_from(self._received)[0]
            if len(self._received) < end:
                return
            with memoryview(self._received) as received:
                answer = pickle.loads(received[SIZE.size : end])
            del self._received[:end]
            _settle(self._awaited.popleft(), answer)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_dead = True
        while self._awaited:
            _settle(self._awaited.popleft(), Answer(error=DeadProcessError()))

    async def _start(self, ready: asyncio.Future[Answer]) -> asyncio.Transport:
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_unix_connection(lambda: self, sock=self._socket)
        if (await ready).error is not None:
            raise RuntimeError("a process that decodes images ended before its first image; its error is above")
        return self._transport


def _settle(awaited: asyncio.Future[Answer], answer: Answer) -> None:
    if not awaited.done():  # else its caller was cancelled
        awaited.set_result(answer)
