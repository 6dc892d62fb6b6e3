"""DDPO on the model in this package: minutes on two CPU cores, nothing to download.

    python scripts/train.py --config configs/demo.py
    python scripts/train.py --config configs/demo.py:incompressibility
    python scripts/train.py --config configs/demo.py:alignment

The prompts leave the background's texture open ("two red circles on a blue background").
Rewarded for small JPEG files the model learns to draw plain backgrounds; rewarded for
large ones, busy ones. For alignment the prompts lack a word that all captions had which
the model was trained on ("a red circle on a blue"): at first it guesses the background's
colour, and rewarded for the colours that the prompt names it learns to read it.
"""

import ml_collections

from configs import base

REWARDS = {"compressibility": "jpeg_compressibility",
           "incompressibility": "jpeg_incompressibility",
           "alignment": "color_alignment"}


def get_config(name: str = "compressibility") -> ml_collections.ConfigDict:
  if name not in REWARDS:
    raise ValueError(f"there is no experiment {name!r}; there are: {', '.join(REWARDS)}")
  config = base.get_config()
  config.pretrained.model = "tiny"
  config.mixed_precision = "no"
  config.seed = 0
  config.num_epochs = 20
  config.save_freq = 4
  config.eval_freq = 4
  config.prompt_fn = "tiny_shapes"
  # Sixteen prompts of a single shape: each comes up sixteen times in an epoch, enough
  # for statistics of its own.
  config.prompt_fn_kwargs = {"max_count": 1, "pool": 16}
  config.reward_fn = REWARDS[name]
  config.per_prompt_stat_tracking = {"buffer_size": 16, "min_count": 8}

  # 128 * 2 = 256 images per epoch.
  config.sample.num_steps = 6
  config.sample.guidance_scale = 1.0
  config.sample.batch_size = 128
  config.sample.num_batches_per_epoch = 2
  config.sample.decode_batch_size = 16

  # 256 / 64 = 4 optimizer steps per epoch.
  config.train.batch_size = 64
  config.train.learning_rate = 5e-3
  # A latent here has 256 elements, Stable Diffusion's 16,384: the mean over them, which
  # is the log-probability, moves by that much more.
  config.train.clip_range = 1e-2
  config.lora.rank = 8
  if name == "alignment":
    config.prompt_fn_kwargs.short = True
  return config
