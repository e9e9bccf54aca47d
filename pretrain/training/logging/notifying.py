"""A user's command on events: a message to a chat, a pager, a dashboard. Nothing waits for it; its failure is its own.

    training.on_event: "curl -s -d @- https://chat.example/hook"

The event comes as JSON on standard input, its kind and the run's folder as INTERNIMAGE_EVENT and INTERNIMAGE_RUN.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pretrain.training.logging.kinds import EventKind

NOTIFIED = frozenset(
    (
        *(EventKind.START, EventKind.RESUME, EventKind.DONE, EventKind.STOPPED, EventKind.FAILED, EventKind.GAVE_UP),
        *(EventKind.ALARM, EventKind.CHECKPOINT_FAILED, EventKind.CHECKPOINT_REFUSED, EventKind.ROLLBACK),
        *(EventKind.STRAGGLER, EventKind.HANG, EventKind.GRACE_EXCEEDED, EventKind.CONFIG_CHANGED),
    )
)

_LONGEST = 16_000  # characters; a pipe holds 64 KiB unread


class Notifier:
    """Starts `command` by the shell for events of the leader, and for the failure of a rank that is at fault itself."""

    def __init__(self, command: str, run: Path) -> None:
        self._command, self._run = command, run
        self._started: list[subprocess.Popen[bytes]] = []

    def __call__(self, event: dict[str, Any], line: str) -> None:
        kind = event["kind"]
        own_failure = kind == EventKind.FAILED and not event.get("lost_partner")
        if kind not in NOTIFIED or not (event["rank"] == 0 or own_failure):
            return
        self._started = [process for process in self._started if process.poll() is None]  # no zombies
        environment = os.environ | {"INTERNIMAGE_EVENT": str(kind), "INTERNIMAGE_RUN": str(self._run)}
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", self._command],
                stdin=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # it outlives this rank
            )
        except OSError as error:
            print(f"training.on_event: {error}", file=sys.stderr, flush=True)
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # one line fits into the pipe's buffer, whether it is read or not
            process.stdin.write(line[:_LONGEST].encode())
            process.stdin.close()
        self._started.append(process)
