"""DDPO on the model in this package: minutes on two CPU cores, nothing to download.

    python scripts/train.py --config configs/demo.py
    python scripts/train.py --config configs/demo.py:incompressibility

The prompts leave the background's texture open ("two red circles on a blue background").
Rewarded for small JPEG files the model learns to draw plain backgrounds; rewarded for
large ones, busy ones.
"""

import ml_collections

from configs import base

REWARDS = {"compressibility": "jpeg_compressibility",
           "incompressibility": "jpeg_incompressibility"}


def get_config(name: str = "compressibility") -> ml_collections.ConfigDict:
  if name not in REWARDS:
    raise ValueError(f"there is no experiment {name!r}; there are: {', '.join(REWARDS)}")
  config = base.get_config()
  config.pretrained.model = "tiny"
  config.mixed_precision = "no"
  config.seed = 0
  config.num_epochs = 12
  config.save_freq = 4
  config.prompt_fn = "tiny_shapes"
  config.reward_fn = REWARDS[name]
  config.per_prompt_stat_tracking = None

  config.sample.num_steps = 10
  config.sample.guidance_scale = 3.0
  config.sample.batch_size = 64
  config.sample.num_batches_per_epoch = 1
  config.sample.decode_batch_size = 16

  # 64 / (16 * 2) = 2 optimizer steps per epoch.
  config.train.batch_size = 16
  config.train.gradient_accumulation_steps = 2
  config.train.learning_rate = 1e-3
  config.train.clip_range = 1e-2
  config.lora.rank = 8
  return config
