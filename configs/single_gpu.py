"""The experiments of dgx.py on one GPU: the same images and optimizer steps per epoch.

    python scripts/train.py --config configs/single_gpu.py:compressibility
    python scripts/train.py --config configs/single_gpu.py:incompressibility
    python scripts/train.py --config configs/single_gpu.py:aesthetic
    python scripts/train.py --config configs/single_gpu.py:prompt_image_alignment

compressibility is planned to take 11.7 GiB (docs/gpu.md), and JAX by default only takes 75% of a
card: a 24 GiB card will do, or a 16 GiB one with XLA_CLIENT_MEM_FRACTION=0.9 in the environment.

For less, halve train.batch_size and double train.gradient_accumulation_steps (7.3 GiB planned
with train.batch_size=4), or set train.gradient_checkpointing="blocks". On a larger card
train.batch_size=16 or 32 (20 and 38 GiB planned), with half or a quarter of the
train.gradient_accumulation_steps, makes a GPU's work less fine-grained, with as many images in
each optimizer step (5 to 7% quicker with 32 on an H200). It is also how many samples are
denoised at a time, so with 32 also set sample.batch_size=32 and sample.num_batches_per_epoch=8.
"""

import ml_collections

from configs import dgx

_DEVICES = 8  # of dgx.py


def get_config(name: str = "compressibility") -> ml_collections.ConfigDict:
  config = dgx.get_config(name)
  # Sampling batches of 16 and microbatches of 8, and more of each.
  images = _DEVICES * config.sample.batch_size * config.sample.num_batches_per_epoch
  config.sample.batch_size = 16
  config.sample.num_batches_per_epoch = images // 16
  config.train.gradient_accumulation_steps *= _DEVICES * config.train.batch_size // 8
  config.train.batch_size = 8
  return config
