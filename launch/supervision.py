"""Watch processes that belong together - ranks here, or one launcher a machine - until one exit code is known.

a request to stop    goes once to every member (see `launch.stopping`)
a failing member     gives the others `failure` seconds to fail by themselves, then SIGTERM, then the end
a lost controller    counts as a request to stop, with `orphans` seconds to finish
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from data_pipeline.errors import BAD_DATA, DONE, GAVE_UP, HANG, INTERRUPTED, OTHER, STOPPED, USAGE
from launch.stopping import HANDLED, Action, StopRequests, as_forwarded, seconds_to_stop

_TICK = 0.05


@dataclass(frozen=True)
class Patience:
    """Seconds. Between a member's failure and SIGTERM to the others, then SIGKILL; for orphans; for a second Ctrl-C."""

    failure: float = 15.0
    terminate: float = 10.0
    orphans: float = 120.0
    interrupt_again: float = 2.0

    @classmethod
    def with_grace(cls, grace: float) -> "Patience":
        """For ranks that take up to `grace` seconds to save."""
        return cls(orphans=seconds_to_stop(grace))


class Member(Protocol):
    """What is watched: `launch.ranks.Rank` or `launch.hostfile.Node`."""

    name: str
    code: int | None
    log: Path | None

    def poll(self) -> int | None: ...
    def send(self, number: int) -> None: ...
    def kill(self) -> None: ...
    def last_words(self) -> str: ...


def combined_code(codes: Sequence[int]) -> int:
    """One exit code for members that ended, in that order, by themselves.

    75 only where all ended 0 or 75 and at least one 75: a rank that was lost may have saved nothing. Of failures
    the first with a meaning of its own counts (bad data, gave up, usage; then a hang), since the ranks beside it fail
    for want of a partner a moment earlier or later; else the first.
    """
    failures = [code for code in codes if code not in (DONE, STOPPED)]
    telling = [code for code in failures if code in (BAD_DATA, GAVE_UP, USAGE)]
    hung = [code for code in failures if code == HANG]
    if failures:
        return (telling or hung or failures)[0]
    return STOPPED if STOPPED in codes else DONE


def watch(members: Sequence[Member], received: list[int], patience: Patience, control: int | None = None) -> int:
    """Block until every member has ended or must be given up; the caller kills what is left.

    `received`: signal numbers appended by `signals_into`. `control`: a file descriptor on which another launcher sends
    signal names, one a line.
    """
    requests = StopRequests(patience.interrupt_again)
    ended: list[Member] = []
    failed_at: float | None = None
    abandoned_at: float | None = None
    terminated = False
    while len(ended) < len(members):
        if control is None:
            time.sleep(_TICK)
        elif not _read_control(control, received):
            control, abandoned_at = None, time.monotonic()
        while received:
            number = received.pop(0)
            action = Action.KILL if number == signal.SIGKILL else requests.decide(number)
            if action is Action.KILL:
                say("killed on request; nothing is saved since the last checkpoint")
                return INTERRUPTED
            if action is Action.FORWARD:
                for member in members:
                    member.send(as_forwarded(number))
        for member in members:
            if member not in ended and member.poll() is not None:
                ended.append(member)
                if failed_at is None and member.code not in (DONE, STOPPED):
                    failed_at = time.monotonic()
        if abandoned_at is not None and time.monotonic() - abandoned_at > patience.orphans:
            break
        if failed_at is not None:
            waited = time.monotonic() - failed_at
            if not terminated and waited > patience.failure:
                terminated = True
                for member in members:
                    member.send(signal.SIGTERM)
            if waited > patience.failure + patience.terminate:
                break
    code = combined_code([m.code for m in ended if m.code is not None]) if ended else OTHER
    if len(ended) < len(members) and code in (DONE, STOPPED):
        code = OTHER
    _explain(ended, code)
    return code


@contextlib.contextmanager
def signals_into(received: list[int]) -> Iterator[None]:
    """Handlers that only take a note. An ignored signal (nohup's HUP) stays ignored. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.getsignal(number) for number in HANDLED}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_control(control: int, received: list[int]) -> bool:
    """Wait one tick for signal names. False: the other end is gone, which counts as a request to stop."""
    if not select.select([control], [], [], _TICK)[0]:
        return True
    data = os.read(control, 4096)
    if not data:
        received.append(signal.SIGTERM)
        return False
    for name in data.decode("ascii", "replace").split():
        number = getattr(signal, f"SIG{name}", None)
        if number in (*HANDLED, signal.SIGKILL):
            received.append(number)
    return True


def _explain(ended: Sequence[Member], code: int) -> None:
    """Quote the log of the member whose code is returned, unless it (or one like it) spoke on this terminal already."""
    guilty = [member for member in ended if member.code == code]
    if not guilty or code in (DONE, STOPPED) or any(m.log is None and code < 128 for m in guilty):
        return
    by_signal = code - 128 in [s.value for s in signal.Signals]
    cause = f"was ended by {signal.Signals(code - 128).name}" if by_signal else f"ended with exit code {code}"
    say(f"{guilty[0].name} {cause}")
    words = guilty[0].last_words()
    if words:
        say(f"the end of {guilty[0].log}:\n{words}")


def say(message: str) -> None:
    """One line of the launcher's own on standard error; lost where nobody reads it any more."""
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # a killed progress bar leaves the cursor hidden
        print(f"internimage: {message}", file=sys.stderr, flush=True)
