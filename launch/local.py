"""Start ranks on this machine as plain processes, pass signals on, and return one exit code.

Neither torchrun nor `deepspeed` serves: both end with 1 whatever the ranks said, so that "stopped after saving" (75) is
lost, and torchrun dies of SIGUSR1 and leaves its ranks behind.

    launcher -- rank 0 (this terminal)  in its own process group
             -- rank 1 (rank-00001.log) in its own process group ...
             -- guardian: cleans up where the launcher itself is killed
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from launch import guardian
from launch.machine import usable_cores
from launch.ports import ReservedPort
from launch.ranks import Placement, Rank, rank_environment
from launch.supervision import Patience, signals_into, watch


def spawn(
    argv: Sequence[str],
    processes: int,
    *,
    placement: Placement | None = None,
    logs: Path | None = None,
    control: int | None = None,
    patience: Patience | None = None,
    hold_signals: bool = False,
) -> int:
    """Run `argv` as `processes` ranks and return one exit code: `combined_code`, or 130 after a repeated Ctrl-C.

    Each rank finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment. Rank 0 writes to this
    terminal, the others to `logs`/rank-NNNNN.log (to this terminal, too, where `logs` is None). `control`: a file
    descriptor on which another launcher sends signal names, one a line; its end counts as SIGTERM. `hold_signals`: for
    ranks that call `ranks.release_signals` when they are ready for them, as ours do.
    """
    placement = placement or Placement()
    patience = patience or Patience()
    received: list[int] = []
    with contextlib.ExitStack() as stack:
        port = placement.master_port or stack.enter_context(ReservedPort()).number
        stack.enter_context(signals_into(received))
        watch_over = stack.enter_context(_guardian(patience.orphans))
        ranks: list[Rank] = []
        stack.callback(_end_all, ranks)
        cores = usable_cores()
        for local in range(processes):
            number = placement.first_rank + local
            environment = rank_environment(os.environ, placement, local, processes, port, cores)
            log = logs / f"rank-{number:05d}.log" if logs is not None and number != 0 else None
            ranks.append(Rank(number, argv, environment, log, hold_signals))
            watch_over(ranks[-1].process.pid)
        return watch(ranks, received, patience, control)


@contextlib.contextmanager
def _guardian(grace: float) -> Iterator[Callable[[int], None]]:
    """The process of `launch.guardian`; gives a function that puts a process group under its eye."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guardian.__file__, str(grace)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def tell(line: object) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()

    try:
        yield tell
    finally:
        tell("done")
        process.communicate()


def _end_all(ranks: list[Rank]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    for rank in ranks:
        rank.process.wait()
