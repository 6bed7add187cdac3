#!/bin/bash
#SBATCH --job-name=delta-{stage}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cores}
#SBATCH --time={hours}:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -eu
{enter}export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" OMP_NUM_THREADS={cpus}
# torchrun kills its processes 30 s after a signal; a checkpoint of a 7B model takes longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p):29500"
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 {command} &
training=$!
code=0
wait "$training" || code=$?
while kill -0 "$training" 2>/dev/null; do code=0; wait "$training" || code=$?; done
exit "$code"
