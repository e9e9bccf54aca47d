"""Errors that a user can act on. Each carries the exit code that the command ends with."""


class UserError(Exception):
    """Usage or configuration is wrong. The message says what, where (file, key, shard) and what to do."""

    exit_code = 2


class BadDataError(UserError):
    """More bad samples than the run allows."""

    exit_code = 3


class GaveUpError(UserError):
    """The run cannot go on: non-finite losses, divergence, a hang."""

    exit_code = 4


class StoppedError(UserError):
    """Stopped on request after saving. The same command continues."""

    exit_code = 75
