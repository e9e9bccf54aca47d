"""Processes that end with the one that started them, and by nothing else that a scheduler tells them."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess

_ASKED = (signal.SIGUSR1, signal.SIGTERM)


class _Worker(SpawnProcess):
    """Process of a pool."""

    def start(self) -> None:
        """Starts the process with the signals blocked until `end_with_parent` ignores them."""
        resource_tracker.ensure_running()  # which unblocks SIGTERM where it has to be started
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)

    def terminate(self) -> None:
        """Kills the process: a pool that broke ends the others so and waits for them, and they ignore SIGTERM."""
        self.kill()


class WorkerContext(SpawnContext):
    """Starts the fresh processes of a pool whose initializer is `end_with_parent`."""

    Process = _Worker


def end_with_parent() -> None:
    """Ends this process when its parent is gone: a worker of a pool whose owner was killed waits for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    for asked in _ASKED:
        signal.signal(asked, signal.SIG_IGN)  # a scheduler tells every process; the parent answers for all
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKED)

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
