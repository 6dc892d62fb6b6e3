"""The experiments of dgx.py on one GPU: the same images and optimizer steps per epoch.

    python scripts/train.py --config configs/single_gpu.py:compressibility
    python scripts/train.py --config configs/single_gpu.py:incompressibility
    python scripts/train.py --config configs/single_gpu.py:aesthetic
    python scripts/train.py --config configs/single_gpu.py:prompt_image_alignment

Less memory: set train.gradient_checkpointing to "blocks", then lower train.batch_size (raising
train.gradient_accumulation_steps), which in half precision is how many samples are denoised at
a time as well.
"""

import ml_collections

from configs import dgx

_DEVICES = 8  # of dgx.py


def get_config(name: str = "compressibility") -> ml_collections.ConfigDict:
  config = dgx.get_config(name)
  # Sampling in batches of 16, training in batches of 8, and more of both: 12 GiB are enough.
  images = _DEVICES * config.sample.batch_size * config.sample.num_batches_per_epoch
  config.sample.batch_size = 16
  config.sample.num_batches_per_epoch = images // 16
  config.train.gradient_accumulation_steps *= _DEVICES * config.train.batch_size // 8
  config.train.batch_size = 8
  return config
