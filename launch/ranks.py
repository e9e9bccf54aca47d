"""One rank as an ordinary process: started in its own process group, signalled, and cleaned up after."""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launch.stopping import HANDLED

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Placement:
    """Where the ranks of this machine stand in the whole run. By default they are the whole run."""

    first_rank: int = 0
    world_size: int | None = None
    master_addr: str = "127.0.0.1"
    master_port: int | None = None


class Rank:
    """A started rank. `code` is None while it runs; ended by signal n, it is 128 + n as in a shell."""

    def __init__(
        self,
        number: int,
        argv: Sequence[str],
        environment: Mapping[str, str],
        log: Path | None = None,
        hold_signals: bool = False,
    ) -> None:
        self.name = f"rank {number}"
        self.log = log
        self.code: int | None = None
        output: IO[bytes] | None = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("ab", buffering=0)
        try:
            self.process = subprocess.Popen(
                list(argv),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,  # Ctrl-C in a terminal reaches the launcher only, which forwards it once
                preexec_fn=_before_exec(os.getpid(), hold_signals),
            )
        finally:
            if output is not None:
                output.close()

    def poll(self) -> int | None:
        """The exit code, or None. What the rank left running in its group is killed before its number is given back."""
        if self.code is None and _has_ended(self.process.pid):
            self.kill()
            code = self.process.wait()
            self.code = code if code >= 0 else 128 - code
        return self.code

    def send(self, number: int) -> None:
        """To the rank itself, not to its loader workers: it needs them until it has saved."""
        if self.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def last_words(self, lines: int = 20) -> str:
        """The end of the log, for a message about why the run ended."""
        if self.log is None:
            return ""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16384))
            text = file.read().decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-lines:])


def rank_environment(
    base: Mapping[str, str], placement: Placement, local_rank: int, processes: int, port: int, cores: int
) -> dict[str, str]:
    """The variables that torch.distributed and DeepSpeed read, plus threads so that ranks share the cores.

    Values that the caller has set for OMP_NUM_THREADS and the like are kept.
    """
    environment = dict(base)
    environment.update(
        RANK=str(placement.first_rank + local_rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(placement.world_size or processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR=placement.master_addr,
        MASTER_PORT=str(port),
    )
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    environment.setdefault("PYTHONUNBUFFERED", "1")  # a killed rank's last lines should be in its log
    environment.setdefault("PYTHONFAULTHANDLER", "1")
    return environment


def _has_ended(process: int) -> bool:
    """Looks without reaping, so that the process (and group) number stays taken."""
    try:
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def release_signals() -> None:
    """In a rank, once its handlers stand: what came since it was started arrives now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)


def _before_exec(parent: int, hold_signals: bool) -> Callable[[], None]:
    """For the child, before exec: SIGTERM when the launcher dies, however it dies.

    hold_signals: requests to stop wait until the rank calls `release_signals`; they would kill it while Python starts.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def arrange() -> None:
        if hold_signals:
            signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(128 + signal.SIGTERM)

    return arrange
