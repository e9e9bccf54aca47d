#!/bin/bash
#SBATCH --job-name=h
#SBATCH --partition=gpu
#SBATCH --account=vision
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:h100:8
#SBATCH --cpus-per-task=12
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --chdir=/project
#SBATCH --output=/runs/h/logs/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --exclusive

export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun no longer takes it from sbatch
export WORD=/runs/h/logs/.word-"$SLURM_JOB_ID" PER_NODE=8 CORES_NEEDED=12
export RANK_LOGS=/runs/h/logs START=$((${SLURM_RESTART_COUNT:-0} * 100))
module load cuda/13
run=/runs/h history=/runs/h/restarts.jsonl
script=/runs/h/slurm.sh
needed=16 spares=0 avoid='' excluded=''
# The nodes to use: of the job's, those that are up and not to be avoided. Spare ones stand at the end.
healthy() {
  local down=""
  if [ "$spares" -gt 0 ]; then down=$(sinfo -h -N -n "$SLURM_JOB_NODELIST" -t down,fail,no_respond -o %n); fi
  scontrol show hostnames "$SLURM_JOB_NODELIST" |
    grep -vxF -f <(printf '%s\n' "$avoid" "$down" | tr -s ', ' '\n') | head -n "$needed"
}
latest() { { [ -n "$run" ] && cat "$run/checkpoints/latest" 2> /dev/null; } || echo none; }
program='trap : USR1 TERM INT
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
exit "$code"'
while true; do
  before=$(latest) refused=""
  rm -f "$WORD".*
  mapfile -t nodes < <(healthy)
  export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((15000 + (SLURM_JOB_ID + 4001 * START) % 15000)) START
  places=(--nodes="${#nodes[@]}" --nodelist="$(IFS=,; echo "${nodes[*]}")" --ntasks-per-node="$PER_NODE")
  echo "job $SLURM_JOB_ID, start $START, on ${nodes[*]}, checkpoint $before"
  if [ "${#nodes[@]}" -lt "$needed" ] || [ -n "$refused" ]; then
    echo "too few healthy nodes: $needed are needed of $SLURM_JOB_NODELIST, refused: ${refused:-none}"
    code=1
  else
    srun "${places[@]}" --ntasks="$((needed * PER_NODE))" --kill-on-bad-exit=1 --wait=60 \
      bash -c "$program" rank \
      internimage pretrain internimage_h_m3i_427m --output 'runs/h with space'
    code=$?
  fi
  action=end pause=0 why="the decision could not be made" rank=""
  eval "$(PYTHON -I -S RESTARTING --code "$code" --word "$WORD" --history "$history" --run "$run" --before "$before" \
    --refused "$refused" --nodes "${nodes[*]}" --job "$SLURM_JOB_ID" --max-restarts 3 --pause 10 --spares 0)"
  if [ -n "$RANK_LOGS" ] && [ "${rank:-0}" != 0 ]; then
    failed_log=$RANK_LOGS/rank-$(printf %05d "$rank").log
    echo "the end of $failed_log:"; tail -n 20 "$failed_log"
  fi
  rm -f "$WORD".*
  echo "job $SLURM_JOB_ID: exit code $code, checkpoint $(latest), then: $action ($why)${avoid:+, avoiding $avoid}"
  [ "$action" = restart ] || break
  sleep "$pause"
  START=$((START + 1))
done
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
