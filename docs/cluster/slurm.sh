#!/bin/bash
# sbatch docs/cluster/slurm.sh: two nodes with eight GPUs each, one process per GPU.
#SBATCH --job-name=ddpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

# SIGTERM arrives two minutes before the time limit, and the run saves. When it is requeued, or
# submitted again with the same RUN_NAME, it resumes. The folders named by logdir and
# pretrained.model must be the same on all nodes. So should that of compilation_cache
# (~/.cache/ddpo_jax/xla), or programs are compiled anew at each start.
#
# Batch sizes are per device, and dgx.py is written for 8 GPUs. On 16, half the batches and half
# the accumulation keep an epoch at 16 * 8 * 2 = 256 images and (8 * 2) / (4 * 1) = 4 optimizer
# steps of 64 images.
set -euo pipefail
cd "${DDPO_JAX:-$SLURM_SUBMIT_DIR}"

# srun does not take --cpus-per-task over from sbatch by itself (since SLURM 22.05).
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  .venv/bin/python scripts/train.py \
  --config configs/dgx.py:compressibility \
  --config.sample.num_batches_per_epoch=2 \
  --config.train.gradient_accumulation_steps=1 \
  --config.run_name="${RUN_NAME:-ddpo}" \
  --config.resume_from=auto
