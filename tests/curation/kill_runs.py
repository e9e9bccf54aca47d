"""Kills a command of curation at random instants and lets it finish: `python kill_runs.py WORK OPERATION KILLS SEED`.

Prints "sound KILLS" where the outcome was that of an unbroken run, byte for byte, every time. A process of its own, for
it forks: imports are paid once, and kills fall into the work.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from curation_sets import files

from data_pipeline.curation.decisions import SetPath
from data_pipeline.curation.duplicates import DuplicateRules, dedup_sets
from data_pipeline.curation.filters import FilterRules, filter_set
from data_pipeline.curation.resharding import Running, merge_sets, split_set
from data_pipeline.curation.takedown import take_down

HERE = Running(workers=1)


def a_filter(folder: Path) -> None:
    filter_set(folder / "web", FilterRules(min_side=70, expressions=("some=row % 4 > 0",)))


def a_dedup(folder: Path) -> None:
    sets = [SetPath(folder / "web"), SetPath(folder / "more")]
    dedup_sets(sets, DuplicateRules(near=True), against=[SetPath(folder / "held")], workers=1)


def a_takedown(folder: Path) -> None:
    (folder / "list.txt").write_text("domain:web.invalid\nhttps://more.invalid/3\n")
    take_down([SetPath(folder / "web"), SetPath(folder / "more")], folder / "list.txt", erase=True)


def a_merge(folder: Path) -> None:
    sources = [SetPath(folder / "web"), SetPath(folder / "more")]
    merge_sets(sources, folder / "all", samples_per_shard=4, shuffle=1, running=HERE)


def a_split(folder: Path) -> None:
    split_set(SetPath(folder / "web"), folder / "parts", {"a": 2, "b": 1}, samples_per_shard=4, running=HERE)


OPERATIONS: dict[str, Callable[[Path], None]] = {
    "filter": a_filter, "dedup": a_dedup, "takedown": a_takedown, "merge": a_merge, "split": a_split,
}  # fmt: skip


def attempt(operation: Callable[[Path], None], folder: Path, seconds: float | None) -> bool:
    """Runs the operation in a child, which is killed after so many seconds; tells whether it ended by itself."""
    child = os.fork()
    if child == 0:
        try:
            operation(folder)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        sys.exit("the operation failed")
    return not os.WIFSIGNALED(status)


def main() -> None:
    work, name, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    operation, rng = OPERATIONS[name], random.Random(seed)
    start, now = work / "start", work / "now"

    def afresh() -> None:
        shutil.rmtree(now, ignore_errors=True)
        shutil.copytree(start, now)  # always the same path: histories and journals hold names

    afresh()
    begun = time.monotonic()
    attempt(operation, now, None)
    seconds = time.monotonic() - begun
    wanted = files(now)
    if wanted == files(start):
        sys.exit("the operation does nothing")
    killed = 0
    while killed < kills:
        afresh()
        for _ in range(rng.randint(1, 3)):  # a run that goes on may be killed again
            killed += not attempt(operation, now, rng.uniform(0, seconds))
        attempt(operation, now, None)
        found = files(now)
        different = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
        if different:
            sys.exit(f"after {killed} kills these differ: {different}")
    print(f"sound {killed}")


if __name__ == "__main__":
    main()
