"""Ends a process when the one that started it is gone."""

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """Ends this process when its parent is gone: a worker of a pool whose owner was killed waits for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a scheduler tells every process; the parent answers for all

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
