"""The functions that a long operation calls while it runs. Every package uses these names."""

from collections.abc import Callable
from typing import Any

Heartbeat = Callable[[], None]  # the work is alive: called more often than a watchdog waits
ProgressCallback = Callable[[int, int], None]  # units done, units in all
Notice = Callable[[str], None]  # takes one line for people
EventSink = Callable[[dict[str, Any]], None]  # takes one event: {"kind": ..., ...}
