"""The experiments of dgx.py on one GPU: the same 256 images and 4 optimizer steps per epoch.

    python scripts/train.py --config configs/single_gpu.py:compressibility
    python scripts/train.py --config configs/single_gpu.py:incompressibility

Less memory: lower sample.batch_size (raising sample.num_batches_per_epoch), then
train.batch_size (raising train.gradient_accumulation_steps), then set
train.gradient_checkpointing to "blocks".
"""

import ml_collections

from configs import dgx


def get_config(name: str = "compressibility") -> ml_collections.ConfigDict:
  config = dgx.get_config(name)
  # 16 * 16 = 256 images per epoch.
  config.sample.batch_size = 16
  config.sample.num_batches_per_epoch = 16
  # 256 / (4 * 16) = 4 optimizer steps per epoch.
  config.train.batch_size = 4
  config.train.gradient_accumulation_steps = 16
  return config
