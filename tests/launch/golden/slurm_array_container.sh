#!/bin/bash
#SBATCH --job-name=internimage
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --array=1-5%1
#SBATCH --signal=USR1@90
#SBATCH --output=./slurm-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --no-requeue

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun no longer takes it from sbatch
export WORD=./.word-"$SLURM_JOB_ID"
rm -f "$WORD.told" "$WORD.first"
run='' script=slurm.sh
latest() { { [ -n "$run" ] && cat "$run/checkpoints/latest" 2> /dev/null; } || echo none; }
before=$(latest)
echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST, checkpoint $before"

srun --kill-on-bad-exit=1 --wait=60 --container-image=/images/house.sqsh --container-mounts=/data:/data \
  bash -c 'trap : USR1 TERM INT
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
"$@"
code=$?
case $code in
  0 | 75) ;;
  2 | 3 | 4) echo $code > "$WORD.told" ;;
  *) (set -C; echo $code > "$WORD.first") ;;
esac 2> /dev/null
exit $code' rank \
  internimage pretrain tiny
code=$?
said=$(cat "$WORD.told" "$WORD.first" 2> /dev/null | head -n 1)
code=${said:-$code}
rm -f "$WORD.told" "$WORD.first"
by_user() {
  [ -n "$run" ] && grep '"kind": "stopped"' "$run/events.jsonl" | tail -n 1 |
    grep -qE '"reason": "(stop file|training.stop_after)"'
}
echo "job $SLURM_JOB_ID: exit code $code, checkpoint $(latest)"
case $code in
  75) by_user || exit $code ;; # the next job of the array goes on
  137 | 143) exit $code ;;
esac
scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" # done, stopped by its user, or an error that would only repeat
exit $code
