"""What a Slurm job asks for: plain values, checked when they are put together."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_pipeline.errors import UserError
from launch.restarting import Budget

WARNING_SECONDS = 300  # between the request to save and the time limit, for programs that do not say what they need


@dataclass(frozen=True)
class Container:
    """An image, by pyxis (`srun --container-image`) or by apptainer. mounts: as HOST:INSIDE,..."""

    image: str
    mounts: str | None = None
    runtime: str = "pyxis"


@dataclass(frozen=True)
class SlurmJob:
    """What goes into the script. Times as Slurm writes them ([days-]hours:minutes:seconds).

    Raises UserError for what sbatch or the script could not read.
    """

    command: tuple[str, ...]
    name: str = "internimage"
    nodes: int = 1  # that the ranks need
    spare_nodes: int = 0  # that stand by for a node that fails
    ranks_per_node: int = 8
    gpus_per_node: str | None = None  # "8" or "h100:8"
    gpus_per_rank: int | None = None  # sites that give each task its own GPU alone
    cpus_per_rank: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    memory: str | None = None  # of a node
    signal_seconds: int = WARNING_SECONDS
    wait_seconds: int = 60
    restarts: Budget = field(default_factory=Budget)
    gate: tuple[str, ...] = ()  # command that leaves a file for each node that is fit, before the ranks start
    array: int | None = None  # a chain of this many jobs, one at a time, in place of requeueing
    after: tuple[str, ...] = ()  # jobs that must have ended well before this one starts
    logs: str = "."
    run: str | None = None  # run directory: its checkpoints tell whether the run moves on, its events why it stopped
    directory: str | None = None
    script: str = "slurm.sh"  # where the script itself is kept
    container: Container | None = None
    setup: tuple[str, ...] = ()  # shell lines before the ranks start: module load, source .../activate
    extra: tuple[str, ...] = ()  # further #SBATCH options, as --exclusive

    def __post_init__(self) -> None:
        check_request(
            self.time,
            self.signal_seconds,
            "set training.policy.grace_seconds (or --signal-seconds)",
            name=self.name,
            logs=self.logs,
            directory=self.directory,
            extra=self.extra,
        )
        if self.nodes < 1 or self.ranks_per_node < 1:
            raise UserError("--nodes and --ranks-per-node are at least 1")
        if self.container is not None:
            for path in (self.run, self.directory):
                if path is not None and ("," in path or ":" in path):
                    raise UserError(f"{path!r}: a container cannot mount a path with ',' or ':'; choose another name")

    @property
    def user_excluded(self) -> tuple[str, ...]:
        """Nodes that the user's own --exclude names: an update of the job's list must keep them."""
        return tuple(option.partition("=")[2] for option in self.extra if option.startswith("--exclude="))


def check_request(
    time: str | None,
    signal_seconds: int,
    otherwise: str,
    *,
    name: str,
    logs: str,
    directory: str | None,
    extra: Sequence[str],
) -> None:
    """Raises UserError for what any job asks for that sbatch could not read, and for a limit that leaves no time.

    otherwise: what to do where no longer limit can be had.
    """
    if time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise UserError(f"--time {time!r}: expected [days-]hours:minutes:seconds, as 2-00:00:00")
    if time is not None and 0 < seconds(time) <= signal_seconds:
        raise UserError(
            f"--time {time} is no longer than the {signal_seconds} s that are kept for saving at its end: give the job "
            f"more time, or {otherwise}"
        )
    for option in extra:
        if not option.startswith("--"):
            raise UserError(f"--sbatch {option!r}: expected an option of sbatch, as --sbatch=--exclusive")
    for what, value in (("--name", name), ("the folder of the logs", logs), ("folder", directory)):
        if value is not None and ("\n" in value or "\r" in value):
            raise UserError(f"{what} {value!r}: a line break cannot stand in a line of #SBATCH; choose another name")
    if "\\" in logs:
        raise UserError(f"{logs!r}: sbatch takes no '\\' in the name of a log; choose another --output")


def seconds(time: str) -> int:
    """A limit as sbatch reads it: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]; 0: none."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, rest = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def command_words(command: Sequence[str]) -> tuple[str, ...]:
    if not command:
        raise UserError("no COMMAND given, as in: internimage launch slurm --nodes 2 pretrain internimage_h_m3i_427m")
    return tuple(command)
