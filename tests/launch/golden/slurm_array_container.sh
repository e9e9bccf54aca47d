#!/bin/bash
#SBATCH --job-name=internimage
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --array=1-5%1
#SBATCH --signal=USR1@90
#SBATCH --output=./slurm-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --no-kill
#SBATCH --no-requeue

export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun no longer takes it from sbatch
export WORD=./.word-"$SLURM_JOB_ID" PER_NODE=1 CORES_NEEDED=0
export RANK_LOGS='' START=$((${SLURM_RESTART_COUNT:-0} * 100))
run='' history=./.restarts.jsonl
needed=1 spares=1 avoid='' excluded=''
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
  # A node is fit that says so within the time; whatever keeps it from it.
  timeout --kill-after=10 180 srun "${places[@]}" --ntasks="$((${#nodes[@]} * PER_NODE))" --label --container-image=/images/house.sqsh --container-mounts=/data:/data \
    bash -c "$program" rank internimage doctor --distributed --gate
  for node in "${nodes[@]}"; do
    [ -e "$WORD.fit.$node" ] || refused="${refused:+$refused,}$node"
  done
  cat "$WORD".unfit.* 2> /dev/null
  rm -f "$WORD".{told,hang,first}
  if [ "${#nodes[@]}" -lt "$needed" ] || [ -n "$refused" ]; then
    echo "too few healthy nodes: $needed are needed of $SLURM_JOB_NODELIST, refused: ${refused:-none}"
    code=1
  else
    srun "${places[@]}" --ntasks="$((needed * PER_NODE))" --kill-on-bad-exit=1 --wait=60 --label --container-image=/images/house.sqsh --container-mounts=/data:/data \
      bash -c "$program" rank \
      internimage pretrain tiny
    code=$?
  fi
  action=end pause=0 why="the decision could not be made" rank=""
  eval "$(PYTHON -I -S RESTARTING --code "$code" --word "$WORD" --history "$history" --run "$run" --before "$before" \
    --refused "$refused" --nodes "${nodes[*]}" --job "$SLURM_JOB_ID" --max-restarts 3 --pause 10 --spares 1)"
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
if [ "$action" = requeue ]; then # the next job of the array goes on
  if [ -n "$avoid" ]; then scontrol update JobId="$SLURM_ARRAY_JOB_ID" ExcNodeList="${excluded:+$excluded,}$avoid"; fi
  exit "$code"
fi
scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" # done, stopped by its user, or an error that would only repeat
exit "$code"
