"""An sbatch script for a run over many nodes: written, shown, submitted.

Slurm's own `srun` starts the ranks - no ssh, no MPI - and each finds its place in Slurm's variables. Slurm sends USR1
to the ranks some minutes before the time limit; they save and leave with 75; the script requeues the job, and the same
command resumes. A 75 that the user asked for (RUN/stop, training.stop_after) ends the job: the run's last `stopped`
event says which it was. 137 and 143 (a lost node, an out-of-memory kill) requeue only while the run moves on.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError

# srun ends the other ranks when one fails and returns the highest code, so that a rank's 3 would read as a neighbour's
# 143. Each rank therefore writes its exit code to a file: bad data, giving up or a configuration error in any case,
# another failure if no rank failed before. Signals go to the whole process group; the traps are the shell's own and
# reach no child.
_RANK = """\
trap : USR1 TERM INT
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
"$@"
code=$?
case $code in
  0 | 75) ;;
  2 | 3 | 4) echo $code > "$WORD.told" ;;
  *) (set -C; echo $code > "$WORD.first") ;;
esac 2> /dev/null
exit $code"""


@dataclass(frozen=True)
class Container:
    """An image, by pyxis (`srun --container-image`) or by apptainer."""

    image: str
    mounts: str | None = None
    runtime: str = "pyxis"


@dataclass(frozen=True)
class SlurmJob:
    """What goes into the script. Times as Slurm writes them ([days-]hours:minutes:seconds)."""

    command: tuple[str, ...]
    name: str = "internimage"
    nodes: int = 1
    ranks_per_node: int = 8
    gpus_per_node: str | None = None  # "8" or "h100:8"
    cpus_per_rank: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    memory: str | None = None
    signal_seconds: int = 300
    wait_seconds: int = 60
    array: int | None = None  # a chain of this many jobs, one at a time, in place of requeueing
    logs: str = "."
    run: str | None = None  # run directory: its checkpoints tell whether the run moves on, its events why it stopped
    directory: str | None = None
    script: str = "slurm.sh"  # where the script itself is kept
    container: Container | None = None
    setup: tuple[str, ...] = ()  # shell lines before the ranks start: module load, source .../activate
    extra: tuple[str, ...] = ()  # further #SBATCH options, as --exclusive

    def __post_init__(self) -> None:
        if self.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise UserError(f"--time {self.time!r}: expected [days-]hours:minutes:seconds, as 2-00:00:00")
        if self.time is not None and 0 < seconds(self.time) <= self.signal_seconds:
            raise UserError(
                f"--time {self.time} is no longer than the {self.signal_seconds} s that the ranks are given to save at "
                "its end: give the job more time, or set training.policy.grace_seconds (or --signal-seconds)"
            )
        if self.nodes < 1 or self.ranks_per_node < 1:
            raise UserError("--nodes and --ranks-per-node are at least 1")
        for option in self.extra:
            if not option.startswith("--"):
                raise UserError(f"--sbatch {option!r}: expected an option of sbatch, as --sbatch=--exclusive")


def seconds(time: str) -> int:
    """A limit as sbatch reads it: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]; 0: none."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, rest = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def script(job: SlurmJob) -> str:
    """The whole sbatch script."""
    parts = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(job)), "", *_preparation(job), "", _srun(job)]
    ending = _ARRAY_END if job.array else _REQUEUE_END
    return "\n".join(parts) + "\n" + _ENDED + ending


def submit(job: SlurmJob) -> str:
    """Write the script to `job.script`, hand it to sbatch, return the job's number. UserError where sbatch refuses."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not found here: submit from a login node, or keep the script with --dry-run > job.sh"
        )
    path = Path(job.script)
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(job.logs).mkdir(parents=True, exist_ok=True)
    path.write_text(script(job), encoding="utf-8")
    answer = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if answer.returncode != 0:
        raise UserError(f"sbatch refused {path}: {answer.stderr.strip()}")
    return answer.stdout.strip().partition(";")[0]


def _options(job: SlurmJob) -> list[str]:
    log = f"{job.logs}/slurm-%A_%a.out" if job.array else f"{job.logs}/slurm-%j.out"
    named: list[tuple[str, object]] = [
        ("job-name", job.name),
        ("partition", job.partition),
        ("account", job.account),
        ("qos", job.qos),
        ("nodes", job.nodes),
        ("ntasks-per-node", job.ranks_per_node),
        ("gres", f"gpu:{job.gpus_per_node}" if job.gpus_per_node else None),
        ("cpus-per-task", job.cpus_per_rank),
        ("mem", job.memory),
        ("time", job.time),
        ("array", f"1-{job.array}%1" if job.array else None),
        ("signal", f"USR1@{job.signal_seconds}"),
        ("chdir", job.directory),
        ("output", log),
        ("open-mode", "append"),
    ]
    options = [f"--{name}={value}" for name, value in named if value is not None]
    return [*options, "--no-requeue" if job.array else "--requeue", *job.extra]


def _preparation(job: SlurmJob) -> list[str]:
    lines = [
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))",
        "export MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1",
        'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"',
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun no longer takes it from sbatch',
        f'export WORD={shlex.quote(job.logs)}/.word-"$SLURM_JOB_ID"',
        'rm -f "$WORD.told" "$WORD.first"',
        *job.setup,
        f"run={shlex.quote(job.run or '')} script={shlex.quote(job.script)}",
        'latest() { { [ -n "$run" ] && cat "$run/checkpoints/latest" 2> /dev/null; } || echo none; }',
        "before=$(latest)",
        'echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST, checkpoint $before"',
    ]
    return lines


def _srun(job: SlurmJob) -> str:
    words = ["srun", "--kill-on-bad-exit=1", f"--wait={job.wait_seconds}"]
    command = list(job.command)
    if job.container is not None and job.container.runtime == "pyxis":
        words.append(f"--container-image={job.container.image}")
        if job.container.mounts:
            words.append(f"--container-mounts={job.container.mounts}")
    elif job.container is not None:
        bind = ["--bind", job.container.mounts] if job.container.mounts else []
        gpus = ["--nv"] if job.gpus_per_node else []
        command = ["apptainer", "exec", *gpus, *bind, job.container.image, *command]
    return f"{shlex.join(words)} \\\n  bash -c {shlex.quote(_RANK)} rank \\\n  {shlex.join(command)}"


_ENDED = """\
code=$?
said=$(cat "$WORD.told" "$WORD.first" 2> /dev/null | head -n 1)
code=${said:-$code}
rm -f "$WORD.told" "$WORD.first"
by_user() {
  [ -n "$run" ] && grep '"kind": "stopped"' "$run/events.jsonl" | tail -n 1 |
    grep -qE '"reason": "(stop file|training.stop_after)"'
}
"""

_REQUEUE_END = """\
again=no now=$(latest)
case $code in
  75) # stopped after saving
    rm -f "$WORD.lost"
    if by_user; then again="no, as asked"; else again=yes; fi ;;
  137 | 143) # killed: a lost node, or memory; pointless where three starts in a row brought no new checkpoint
    if [ "$now" = "$before" ]; then echo "$now" >> "$WORD.lost"; fi
    if [ "$now" != "$before" ] || [ "$(grep -cxF "$now" "$WORD.lost")" -lt 3 ]; then again=yes; fi ;;
esac
echo "job $SLURM_JOB_ID: exit code $code, checkpoint $now, start again: $again"
# Slurm holds a requeued job for two minutes, until its old credential is surely dead.
if [ "$again" = yes ]; then
  scontrol requeue "$SLURM_JOB_ID" || echo "not requeued; submit again: sbatch $script"
else
  rm -f "$WORD.lost"
fi
exit $code
"""

_ARRAY_END = """\
echo "job $SLURM_JOB_ID: exit code $code, checkpoint $(latest)"
case $code in
  75) by_user || exit $code ;; # the next job of the array goes on
  137 | 143) exit $code ;;
esac
scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" # done, stopped by its user, or an error that would only repeat
exit $code
"""


def command_words(command: Sequence[str]) -> tuple[str, ...]:
    if not command:
        raise UserError("no COMMAND given, as in: internimage launch slurm --nodes 2 pretrain internimage_h_m3i_427m")
    return tuple(command)
