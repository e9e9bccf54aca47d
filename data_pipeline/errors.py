"""Errors that a user can act on, and the exit codes of every command."""

from collections.abc import Sequence

DONE = 0
OTHER = 1
USAGE = 2
BAD_DATA = 3
GAVE_UP = 4
HANG = 5
STOPPED = 75
INTERRUPTED = 130


class UserError(Exception):
    """Usage or configuration is wrong. The message says what, where (file, key, shard) and what to do."""

    exit_code = USAGE


class BadDataError(UserError):
    """More bad samples than the run allows."""

    exit_code = BAD_DATA


class GaveUpError(UserError):
    """The run cannot go on: non-finite losses, divergence, checkpoints that cannot be written."""

    exit_code = GAVE_UP


class StoppedError(UserError):
    """Stopped on request after saving. The same command continues."""

    exit_code = STOPPED


def first_ten(names: Sequence[object], separator: str = ", ") -> str:
    """The names in one text; beyond ten the rest is counted."""
    shown = [str(name) for name in names[:10]]
    return separator.join(shown if len(names) <= 10 else [*shown, f"... and {len(names) - 10} more"])
