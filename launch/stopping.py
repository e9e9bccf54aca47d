"""What a launcher does with the signals that it receives: a pure decision, one shell-free table.

first TERM, INT, USR1 or HUP   forward once to every rank: the ranks save and leave with 75
any further one                ignored: Slurm sends USR1 and then TERM, Ctrl-C may arrive twice
INT, 2 s or more after an INT  the user means it: kill
"""

import enum
import signal
import time
from collections.abc import Callable

# Beyond the ranks' own grace (training.policy.grace_seconds): a watchdog writes its stacks, srun gathers the codes, and
# Slurm's clock is up to 15 s off.
MARGIN_SECONDS = 30.0
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Action(enum.Enum):
    FORWARD = "forward"
    IGNORE = "ignore"
    KILL = "kill"


class StopRequests:
    """Remembers the requests so far. `clock` gives seconds that never go back."""

    def __init__(self, again_after: float = 2.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._again_after = again_after
        self._clock = clock
        self._first_interrupt: float | None = None
        self.requested = False

    def decide(self, number: int) -> Action:
        now = self._clock()
        if number == signal.SIGINT:
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt >= self._again_after:
                return Action.KILL
        if self.requested:
            return Action.IGNORE
        self.requested = True
        return Action.FORWARD


def seconds_to_stop(grace: float) -> float:
    """From the request until ranks that save within `grace` seconds have surely ended."""
    return grace + MARGIN_SECONDS


def as_forwarded(number: int) -> int:
    """A lost terminal is a request to stop like any other; ranks need to know only one signal for it."""
    return signal.SIGTERM if number == signal.SIGHUP else number
