"""A Slurm array for work that any number of tasks share: each claims units through the file system until none is left.

A task that is asked to stop (USR1, some minutes before its time limit) ends behind its shard with 75 and is queued
again; so is one that was killed with its node. Whatever a dead task held is taken over by the others. Nobody waits for
anybody: the task that sees the last unit done finishes the set.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.errors import UserError
from launch import sbatch_lines
from launch.invocation import own_command
from launch.job import check_request

_SHARED = ("pack", "fetch", "reshard", "merge", "split")
_IN_PARTS = ("pack", "fetch")
_PARTS_A_TASK = 8  # so that a task that comes late, or that others outlive, has something to take over

# USR1 reaches every process of the step; the shell must outlive it. Slurm holds a requeued task for two minutes.
_BODY = """\
trap : USR1 TERM
echo "task $SLURM_ARRAY_TASK_ID of job $SLURM_ARRAY_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
"""
_END = """\
code=$?
again=no
case $code in
  75 | 137 | 138 | 143) [ "${SLURM_RESTART_COUNT:-0}" -lt %(restarts)d ] && again=yes ;;
esac
echo "task $SLURM_ARRAY_TASK_ID: exit code $code, start again: $again"
if [ "$again" = yes ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" || echo "not requeued; submit again: sbatch $0"
fi
exit $code
"""


@dataclass(frozen=True)
class TaskArray:
    """What goes into the script. Times as Slurm writes them. Raises UserError for what sbatch could not read."""

    command: tuple[str, ...]
    tasks: int
    name: str = "internimage-shards"
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    memory: str | None = None
    signal_seconds: int = 300
    logs: str = "."
    directory: str | None = None
    restarts: int = 100
    after: tuple[str, ...] = ()  # jobs that must have ended well before the first task starts
    setup: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_request(
            self.time,
            self.signal_seconds,
            "set --signal-seconds to what a shard takes",
            name=self.name,
            logs=self.logs,
            directory=self.directory,
            extra=self.extra,
        )


def shared_command(command: Sequence[str], tasks: int) -> tuple[str, ...]:
    """Returns the words that every task runs, by this interpreter. Raises UserError for work that is not shared."""
    words = list(command[1:]) if command[:1] == ["internimage"] else list(command)
    if words[:1] != ["shards"] or len(words) < 2 or words[1] not in _SHARED:
        raise UserError(
            f"--tasks: {shlex.join(command)!r} is not work that tasks share; these are shards {', '.join(_SHARED)}"
        )
    if words[1] in _IN_PARTS and any(re.match(r"--retry(=|$)", word) for word in words):
        raise UserError("--tasks: parts that are done are not made again; finish the set, then --retry by one task")
    given = any(re.match(r"--parts?(=|$)", word) for word in words)
    if words[1] in _IN_PARTS and not given:
        words += ["--parts", str(tasks * _PARTS_A_TASK)]
    return tuple(own_command(words))


def array_script(array: TaskArray) -> str:
    """Writes the whole sbatch script."""
    named: list[tuple[str, object]] = [
        ("job-name", array.name),
        ("partition", array.partition),
        ("account", array.account),
        ("qos", array.qos),
        ("array", f"1-{array.tasks}"),
        ("nodes", 1),
        ("ntasks", 1),
        ("cpus-per-task", array.cpus_per_task),
        ("mem", array.memory),
        ("time", array.time),
        ("dependency", sbatch_lines.after(array.after)),
        ("signal", f"USR1@{array.signal_seconds}"),
        ("chdir", array.directory),
        ("output", sbatch_lines.log_file(array.logs, "shards-%A_%a.out")),
        ("open-mode", "append"),
    ]
    options = [*sbatch_lines.options(named), *(["--kill-on-invalid-dep=yes"] if array.after else []), "--requeue"]
    head = ["#!/bin/bash", *(f"#SBATCH {option}" for option in [*options, *array.extra]), ""]
    head += [sbatch_lines.CPUS_PER_TASK]
    return "\n".join([*head, *array.setup, _BODY + f"srun {shlex.join(array.command)}\n" + _END % vars(array)])
