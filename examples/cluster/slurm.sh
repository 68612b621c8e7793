#!/bin/bash
# One run on two nodes of eight GPUs under Slurm:
#     sbatch examples/cluster/slurm.sh run.yaml output_dir=runs/people
# Every node sees the same output_dir. A run that was stopped goes on with resume_from_checkpoint=auto:
# Slurm warns it 120 seconds before the end of its time, and it saves.
#SBATCH --job-name=lorry
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

# srun starts a process for each GPU and says which one it is, in words of its own
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${HOSTS%%$'\n'*}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# shellcheck disable=SC2016 # the variables are those of each process
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python -m lorry sft "$@"
' lorry backend=fsdp "$@"
