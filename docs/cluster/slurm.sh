#!/bin/bash
# sbatch docs/cluster/slurm.sh: two nodes of eight GPUs, a process for each GPU.
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

# SIGTERM comes two minutes before the job's time is up, and the run saves. Requeued, or
# submitted again under the same RUN_NAME, it goes on where it was. The folders that
# logdir and pretrained.model name must be visible to all nodes.
set -euo pipefail
cd "${DDPO_JAX:-$SLURM_SUBMIT_DIR}"

srun --kill-on-bad-exit=1 .venv/bin/python scripts/train.py \
  --config configs/dgx.py:compressibility \
  --config.run_name="${RUN_NAME:-ddpo}" \
  --config.resume_from=auto
