#!/bin/bash
# Runs a training or certification stage on several nodes under Slurm. The repository must be on a file system that they
# share:
#
#     sbatch --nodes 4 --gpus-per-node 8 --time 24:00:00 stages/slurm.sh stages/pretrain.py rrcm
#     sbatch --nodes 1 --gpus-per-node 8 stages/slurm.sh stages/finetune.py rrcm 0.5
#
# Afterwards, record the outputs with `dvc commit pretrain@rrcm` (or finetune@rrcm-0.5). Before the time limit, and when
# the job is preempted, the stage saves its state and the job is queued again. It then continues where it stopped.
#SBATCH --job-name=rrcm
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

source .venv/bin/activate
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29500" "$@" &
child=$! stopped=
trap 'stopped=1; kill -TERM $child' TERM
wait $child || { [ "$stopped" ] && wait $child; } # SIGTERM ends the first wait while the job is still saving
status=$?
[ "$stopped" ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
