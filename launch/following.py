"""Logs of ranks: which file is whose, its end, and what is added to it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.errors import UserError

_PAUSE = 0.5
_LONGEST_LINE = 2000  # bytes, in the mean of the lines asked for


def log_of(run: Path, rank: int) -> Path:
    """Rank 0 writes to the log of its Slurm job, of which the newest counts, any other rank to its own.

    Raises UserError where there is none.
    """
    folder = run / "logs"
    if rank:
        path = folder / f"rank-{rank:05d}.log"
        if not path.is_file():
            known = sorted(int(found.stem.removeprefix("rank-")) for found in folder.glob("rank-*.log"))
            there = f"there are ranks {known[0]} to {known[-1]}" if known else "there is none of any rank"
            raise UserError(f"{path}: no such log; {there}")
        return path
    jobs = sorted(folder.glob("slurm-*.out"), key=lambda found: found.stat().st_mtime)
    if not jobs:
        raise UserError(f"{folder}: no log of a Slurm job; without Slurm rank 0 writes to the terminal (try --rank 1)")
    return jobs[-1]


def last_lines(path: Path, count: int) -> str:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - count * _LONGEST_LINE))
        return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-count:])


def follow(path: Path, sleep: Callable[[float], object] = time.sleep) -> Iterator[str]:
    """What is added to a file from now on, without end. A file that was cut is read from its start."""
    place = path.stat().st_size
    while True:
        size = path.stat().st_size
        if size < place:
            place = 0
        if size > place:
            with path.open("rb") as file:
                file.seek(place)
                text = file.read()
            place += len(text)
            yield text.decode("utf-8", "replace")
        sleep(_PAUSE)
