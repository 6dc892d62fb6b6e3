"""ddpo-pytorch's experiments on eight GPUs.

    python scripts/train.py --config configs/dgx.py:compressibility
    python scripts/train.py --config configs/dgx.py:incompressibility

256 images per epoch and 4 optimizer steps. What to expect, from the paper
(arXiv:2305.13301, figure 4): the JPEG size falls, or rises, steadily over 100 epochs,
while the pictures lose, or gain, detail.
"""

import ml_collections

from configs import base


def compressibility() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.pretrained.model = "CompVis/stable-diffusion-v1-4"
  config.num_epochs = 100
  config.save_freq = 1
  config.num_checkpoint_limit = 100_000_000
  # 8 GPUs * 8 * 4 = 256 images per epoch.
  config.sample.batch_size = 8
  config.sample.num_batches_per_epoch = 4
  # (8 * 4) / (4 * 2) = 4 optimizer steps per epoch.
  config.train.batch_size = 4
  config.train.gradient_accumulation_steps = 2
  config.prompt_fn = "imagenet_animals"
  config.reward_fn = "jpeg_compressibility"
  return config


def incompressibility() -> ml_collections.ConfigDict:
  config = compressibility()
  config.reward_fn = "jpeg_incompressibility"
  return config


EXPERIMENTS = {f.__name__: f for f in (compressibility, incompressibility)}


def get_config(name: str = "compressibility") -> ml_collections.ConfigDict:
  if name not in EXPERIMENTS:
    raise ValueError(f"there is no experiment {name!r}; there are: "
                     f"{', '.join(EXPERIMENTS)}")
  return EXPERIMENTS[name]()
