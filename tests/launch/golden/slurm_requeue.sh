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

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun no longer takes it from sbatch
export WORD=/runs/h/logs/.word-"$SLURM_JOB_ID"
rm -f "$WORD.told" "$WORD.first"
module load cuda/13
run=/runs/h script=/runs/h/slurm.sh
latest() { { [ -n "$run" ] && cat "$run/checkpoints/latest" 2> /dev/null; } || echo none; }
before=$(latest)
echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST, checkpoint $before"

srun --kill-on-bad-exit=1 --wait=60 \
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
  internimage pretrain internimage_h_m3i_427m --output 'runs/h with space'
code=$?
said=$(cat "$WORD.told" "$WORD.first" 2> /dev/null | head -n 1)
code=${said:-$code}
rm -f "$WORD.told" "$WORD.first"
by_user() {
  [ -n "$run" ] && grep '"kind": "stopped"' "$run/events.jsonl" | tail -n 1 |
    grep -qE '"reason": "(stop file|training.stop_after)"'
}
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
