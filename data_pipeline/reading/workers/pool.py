"""Runs worker processes that fill batches in shared memory, and hands the batches on in order.

    parent:  task (slot, first position) --pipe--> worker: fills the slot --pipe--> parent: a batch over it, not copied
The slot is free again when the last tensor over it is gone. A task is a pure function, so any worker may do it. Tasks
are a few bytes, so that all that are ahead fit into the pipe: a parent that waited to send one would not read the
answer that the worker waits to send.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

import cv2
import numpy as np
import torch

from data_pipeline.errors import UserError
from data_pipeline.hashing import Integers
from data_pipeline.reading.workers.builder import BatchBuilder, Filled
from data_pipeline.reading.workers.memory import Arrays, Layout, SharedMemory, slot_arrays, slot_bytes

_SPARE = 2  # slots for batches in the consumer's hands
_POLL_SECONDS = 1.0
_OUT_OF_MEMORY = "; signal 9 is mostly the kernel short of memory: lower data.workers or data.prefetch"
_Name = TypeVar("_Name")


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    pending: int = 0


class WorkerPool:
    """`workers` processes, `prefetch` tasks ahead for each."""

    def __init__(
        self, builder: BatchBuilder, layout: Layout, *, workers: int, prefetch: int, start_method: str
    ) -> None:
        slots = workers * prefetch + _SPARE
        self._layout = layout
        self._memory = SharedMemory(slots * slot_bytes(layout))
        self._free: deque[int] = deque(range(slots))
        self._ahead = workers * prefetch
        context = multiprocessing.get_context(start_method)
        self._workers: list[_Worker] = []
        for number in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(  # type: ignore[attr-defined]
                target=_work,
                args=(builder, self._memory, layout, theirs, os.getpid()),
                name=f"reader-{number}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
        self._finalizer = weakref.finalize(self, _end, self._workers, self._memory)

    def run(self, tasks: Iterable[tuple[_Name, Integers]]) -> Iterator[tuple[_Name, Integers, Arrays, Filled]]:
        """(name, positions) -> (name, positions, arrays, what goes with them), in the order of the tasks.

        Positions of a task follow one another."""
        coming = iter(tasks)
        queue: deque[tuple[_Name, Integers, int, _Worker]] = deque()
        while True:
            while len(queue) < self._ahead and self._free and (task := next(coming, None)) is not None:
                worker = min(self._workers, key=lambda w: w.pending)
                slot = self._free.popleft()
                self._send(worker, (slot, int(task[1][0]), len(task[1])))
                worker.pending += 1
                queue.append((*task, slot, worker))
            if not queue:
                return
            name, positions, slot, worker = queue.popleft()
            done = self._receive(worker)
            worker.pending -= 1
            yield name, positions, self._arrays(slot), done

    def close(self) -> None:
        self._finalizer()

    def _arrays(self, slot: int) -> Arrays:
        """Returns the slot's arrays; a copy where the consumer holds so many batches that no slot would be left."""
        whole, arrays = slot_arrays(self._memory, slot, self._layout)
        if not self._free:
            self._free.append(slot)
            return {name: array.copy() for name, array in arrays.items()}
        weakref.finalize(whole, self._free.append, slot).atexit = False
        return arrays

    def _send(self, worker: _Worker, task: tuple[int, int, int]) -> None:
        try:
            worker.pipe.send(task)
        except OSError:
            raise self._died(worker) from None

    def _receive(self, worker: _Worker) -> Filled:
        wait([worker.pipe, worker.process.sentinel])
        try:
            if not worker.pipe.poll():
                raise EOFError
            done = worker.pipe.recv()
        except (EOFError, OSError):
            raise self._died(worker) from None
        if isinstance(done, BaseException):
            raise done
        assert isinstance(done, Filled)
        return done

    def _died(self, worker: _Worker) -> RuntimeError:
        worker.process.join(5)
        code = worker.process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return RuntimeError(f"{worker.process.name} died ({how}){_OUT_OF_MEMORY if code == -9 else ''}")


def _end(workers: list[_Worker], memory: SharedMemory) -> None:
    """Kills the workers, which is safe: they only read, and the cache writes under temporary names."""
    for worker in workers:
        worker.process.kill()
        worker.pipe.close()
    for worker in workers:
        worker.process.join()
    memory.close()


def _work(builder: BatchBuilder, memory: SharedMemory, layout: Layout, pipe: Connection, parent: int) -> None:
    """Works until the parent closes the pipe, kills the worker, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a stop request is for the rank, which ends its workers
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        try:
            slot, first, count = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            arrays = slot_arrays(memory, slot, layout)[1]
            answer: Filled | BaseException = builder.fill(np.arange(first, first + count, dtype=np.int64), arrays)
        except UserError as error:
            answer = error
        except BaseException:
            answer = RuntimeError(f"in {multiprocessing.current_process().name}:\n{traceback.format_exc()}")
        try:
            pipe.send(answer)
        except (OSError, pickle.PicklingError):
            return


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, whatever it waits for. The pipe alone does not show that: siblings
    hold copies of its ends."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(0)
