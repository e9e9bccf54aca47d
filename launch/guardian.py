"""A tiny process that outlives its launcher for as long as it takes to leave no orphans.

The ranks get SIGTERM from the kernel when the launcher dies (see `launch.ranks`) and may still save. What is left of
their process groups when `GRACE` seconds have passed is killed: hung ranks, loader workers of dead ranks.

Run as a script: `python guardian.py GRACE`, with the process-group numbers on standard input, one a line. The line
`done` ends it without killing; end of file without `done` means that the launcher died.
"""

import os
import signal
import sys
import time


def start_time(process: int) -> str | None:
    """Field 22 of /proc/PID/stat tells a process from a later one with the same number."""
    try:
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def group_lives(group: int, leader_started: str | None) -> bool:
    now = start_time(group)
    if now is not None and now != leader_started:
        return False  # the number belongs to somebody else by now
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False
    return True


def main() -> None:
    grace = float(sys.argv[1])
    groups: dict[int, str | None] = {}
    for line in sys.stdin:
        if line.strip() == "done":
            return
        groups[int(line)] = start_time(int(line))
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(group_lives(g, s) for g, s in groups.items()):
        time.sleep(0.1)
    for group, started in groups.items():
        if group_lives(group, started):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
