"""The text of an sbatch script: ranks on healthy nodes, whose end `restarting.py` judges; again in the job, or queued.

    health gate -> srun all ranks -> restarting.py decides -> end | again here, with a new rendezvous | requeue

Slurm sends USR1 to the ranks some minutes before the time limit; they save and leave with 75, and the same command
resumes. The script holds no judgement of its own: what an exit code means stands in `launch/restarting.py` alone.
"""

import shlex
import sys
from collections.abc import Sequence

from launch import restarting, sbatch_lines
from launch.job import SlurmJob

GATE_SECONDS = 180  # for all nodes together; a healthy one answers within a minute

# srun ends the other ranks when one fails and returns the highest code, so that a rank's 3 would read as a neighbour's
# 143. Each rank therefore leaves a word, `code node rank`: bad data, giving up or a configuration error in any case, a
# hang under a name of its own, another failure if no rank failed before. A word is a symbolic link that points at what
# is said: one rank alone makes it, and a full disk takes it, too. Signals go to the whole process group; the traps are
# the shell's own and reach no child.
_RANK = """\
trap : USR1 TERM INT
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$PER_NODE
node=${SLURMD_NODENAME:-$(hostname)}
cores=$(env -u OMP_NUM_THREADS nproc)
if [ "$LOCAL_RANK" = 0 ] && [ "$cores" -lt "${CORES_NEEDED:-0}" ]; then
  echo "warning: $node gives $cores cores to a rank that needs $CORES_NEEDED; its loader will be slow" >&2
fi
if [ -n "$RANK_LOGS" ] && [ "$RANK" != 0 ]; then
  exec >> "$RANK_LOGS/rank-$(printf %05d "$RANK").log" 2>&1
  echo "--- job $SLURM_JOB_ID, start $START, rank $RANK on $node"
fi
"$@"
code=$?
said="$code $node $RANK"
case $code in
  0 | 75) ;;
  2 | 3 | 4) ln -sT "$said" "$WORD.told" ;;
  5) ln -sT "$said" "$WORD.hang" ;;
  *) ln -sT "$said" "$WORD.first" ;;
esac 2> /dev/null
exit "$code\""""

_HEALTHY = """\
# The nodes to use: of the job's, those that are up and not to be avoided. Spare ones stand at the end.
healthy() {
  local down=""
  if [ "$spares" -gt 0 ]; then down=$(sinfo -h -N -n "$SLURM_JOB_NODELIST" -t down,fail,no_respond -o %n); fi
  scontrol show hostnames "$SLURM_JOB_NODELIST" |
    grep -vxF -f <(printf '%s\\n' "$avoid" "$down" | tr -s ', ' '\\n') | head -n "$needed"
}
latest() { { [ -n "$run" ] && cat "$run/checkpoints/latest" 2> /dev/null; } || echo none; }
"""

_GATE = """\
  # A node is fit that says so within the time; whatever keeps it from it.
  timeout --kill-after=10 {seconds} srun "${{places[@]}}" --ntasks="$((${{#nodes[@]}} * PER_NODE))" {options} \\
    bash -c "$program" rank {gate}
  for node in "${{nodes[@]}}"; do
    [ -e "$WORD.fit.$node" ] || refused="${{refused:+$refused,}}$node"
  done
  cat "$WORD".unfit.* 2> /dev/null
  rm -f "$WORD".{{told,hang,first}}
"""

_START = """\
program={program}
while true; do
  before=$(latest) refused=""
  rm -f "$WORD".*
  mapfile -t nodes < <(healthy)
  export MASTER_ADDR=${{nodes[0]}} MASTER_PORT=$((15000 + (SLURM_JOB_ID + 4001 * START) % 15000)) START
  places=(--nodes="${{#nodes[@]}}" --nodelist="$(IFS=,; echo "${{nodes[*]}}")" --ntasks-per-node="$PER_NODE")
  echo "job $SLURM_JOB_ID, start $START, on ${{nodes[*]}}, checkpoint $before"
{gate}\
  if [ "${{#nodes[@]}}" -lt "$needed" ] || [ -n "$refused" ]; then
    echo "too few healthy nodes: $needed are needed of $SLURM_JOB_NODELIST, refused: ${{refused:-none}}"
    code=1
  else
    srun "${{places[@]}}" --ntasks="$((needed * PER_NODE))" {options} \\
      bash -c "$program" rank \\
      {command}
    code=$?
  fi
"""

_JUDGED = """\
  action=end pause=0 why="the decision could not be made" rank=""
  eval "$({decide} --code "$code" --word "$WORD" --history "$history" --run "$run" --before "$before" \\
    --refused "$refused" --nodes "${{nodes[*]}}" --job "$SLURM_JOB_ID" {budget})"
  if [ -n "$RANK_LOGS" ] && [ "${{rank:-0}}" != 0 ]; then
    failed_log=$RANK_LOGS/rank-$(printf %05d "$rank").log
    echo "the end of $failed_log:"; tail -n 20 "$failed_log"
  fi
  rm -f "$WORD".*
  echo "job $SLURM_JOB_ID: exit code $code, checkpoint $(latest), then: $action ($why)${{avoid:+, avoiding $avoid}}"
  [ "$action" = restart ] || break
  sleep "$pause"
  START=$((START + 1))
done
"""

_REQUEUE_END = """\
if [ "$action" = requeue ]; then
  # Slurm ends this script, too, as soon as it requeues the job, but only after its KillWait; and it holds a requeued
  # job for two minutes, until its old credential is surely dead.
  trap '' TERM
  if scontrol requeue "$SLURM_JOB_ID"; then
    for _ in $([ -z "$avoid" ] || seq 25); do
      scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${excluded:+$excluded,}$avoid" 2> /dev/null && break
      sleep 1
    done
  else
    echo "not requeued; submit again: sbatch $script"
  fi
fi
exit "$code"
"""

_ARRAY_END = """\
if [ "$action" = requeue ]; then # the next job of the array goes on
  if [ -n "$avoid" ]; then scontrol update JobId="$SLURM_ARRAY_JOB_ID" ExcNodeList="${excluded:+$excluded,}$avoid"; fi
  exit "$code"
fi
scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" # done, stopped by its user, or an error that would only repeat
exit "$code"
"""


def script(job: SlurmJob) -> str:
    """The whole sbatch script."""
    head = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(job)), "", *_preparation(job), _HEALTHY]
    return "\n".join(head) + _loop(job) + (_ARRAY_END if job.array else _REQUEUE_END)


def _options(job: SlurmJob) -> list[str]:
    log = "slurm-%A_%a.out" if job.array else "slurm-%j.out"
    named: list[tuple[str, object]] = [
        ("job-name", job.name),
        ("partition", job.partition),
        ("account", job.account),
        ("qos", job.qos),
        ("nodes", job.nodes + job.spare_nodes),
        ("ntasks-per-node", job.ranks_per_node),
        ("gres", f"gpu:{job.gpus_per_node}" if job.gpus_per_node and not job.gpus_per_rank else None),
        ("gpus-per-task", job.gpus_per_rank),
        ("cpus-per-task", job.cpus_per_rank),
        ("mem", job.memory),
        ("time", job.time),
        ("array", f"1-{job.array}%1" if job.array else None),
        ("dependency", sbatch_lines.after(job.after)),
        ("signal", f"USR1@{job.signal_seconds}"),
        ("chdir", job.directory),
        ("output", sbatch_lines.log_file(job.logs, log)),
        ("open-mode", "append"),
    ]
    options = sbatch_lines.options(named)
    options += ["--no-kill"] if job.spare_nodes else []
    options += ["--kill-on-invalid-dep=yes"] if job.after else []
    return [*options, "--no-requeue" if job.array else "--requeue", *job.extra]


def _preparation(job: SlurmJob) -> list[str]:
    logs = shlex.quote(job.logs)
    history = f"{job.run}/{restarting.HISTORY}" if job.run else f"{job.logs}/.{restarting.HISTORY}"
    lines = [
        "export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1",
        'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"',
        sbatch_lines.CPUS_PER_TASK,
        f'export WORD={logs}/.word-"$SLURM_JOB_ID" PER_NODE={job.ranks_per_node} CORES_NEEDED={job.cpus_per_rank or 0}',
        f"export RANK_LOGS={logs if job.run else chr(39) * 2} START=$((${{SLURM_RESTART_COUNT:-0}} * 100))",
        *job.setup,
        f"run={shlex.quote(job.run or '')} history={shlex.quote(history)}",
        *([] if job.array else [f"script={shlex.quote(job.script)}"]),
        f"needed={job.nodes} spares={job.spare_nodes} avoid='' excluded={shlex.quote(','.join(job.user_excluded))}",
    ]
    return lines


def _loop(job: SlurmJob) -> str:
    words = ["--kill-on-bad-exit=1", f"--wait={job.wait_seconds}", *([] if job.run else ["--label"])]
    options, command = _inside(job, job.command)
    gate = ""
    if job.gate:
        gate_options, gate_command = _inside(job, job.gate)
        gate = _GATE.format(
            seconds=GATE_SECONDS, options=shlex.join(["--label", *gate_options]), gate=shlex.join(gate_command)
        )
    start = _START.format(
        program=shlex.quote(_RANK), gate=gate, options=shlex.join([*words, *options]), command=shlex.join(command)
    )
    budget = f"--max-restarts {job.restarts.max_restarts} --pause {job.restarts.pause:g} --spares {job.spare_nodes}"
    decide = f"{shlex.quote(sys.executable)} -I -S {shlex.quote(restarting.__file__)}"
    return start + _JUDGED.format(decide=decide, budget=budget)


def _inside(job: SlurmJob, command: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options of srun, argument vector) that run `command` in the job's container, where it has one."""
    if job.container is None:
        return [], list(command)
    mounts = _mounts(job)
    if job.container.runtime == "pyxis":
        place = [f"--container-workdir={job.directory}"] if job.directory else []
        bind = [f"--container-mounts={mounts}"] if mounts else []
        return [f"--container-image={job.container.image}", *bind, *place], list(command)
    bind = ["--bind", mounts] if mounts else []
    place = ["--pwd", job.directory] if job.directory else []
    gpus = ["--nv"] if job.gpus_per_node else []
    return [], ["apptainer", "exec", *gpus, *bind, *place, job.container.image, *command]


def _mounts(job: SlurmJob) -> str:
    """What the user mounts, and what the ranks cannot do without: the run's folder and the working directory."""
    given = [job.container.mounts] if job.container is not None and job.container.mounts else []
    own = dict.fromkeys(path for path in (job.run, job.directory) if path is not None)
    return ",".join([*given, *(f"{path}:{path}" for path in own)])
