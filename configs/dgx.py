"""ddpo-pytorch's experiments, for eight GPUs.

    python scripts/train.py --config configs/dgx.py:compressibility
    python scripts/train.py --config configs/dgx.py:incompressibility
    python scripts/train.py --config configs/dgx.py:aesthetic
    python scripts/train.py --config configs/dgx.py:prompt_image_alignment

256 images per epoch (384 for the last) and 4 optimizer steps (2 for the last two). Batch sizes
are per device: with another number of GPUs, scale sample.num_batches_per_epoch and
train.gradient_accumulation_steps to keep these numbers (docs/scaling.md).

What to expect, from the paper (arXiv:2305.13301, figure 4): JPEG size falls, or rises, steadily
over 100 epochs, while images lose, or gain, detail; the aesthetic score rises by about a point.
"""

import ml_collections

from configs import base


def compressibility() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.pretrained.model = "CompVis/stable-diffusion-v1-4"
  config.num_epochs = 100
  config.save_freq = 1
  config.num_checkpoint_limit = 100_000_000  # all of them: 10 MB each with LoRA
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


def aesthetic() -> ml_collections.ConfigDict:
  config = compressibility()
  config.num_epochs = 200
  config.reward_fn = "aesthetic_score"
  # Harder to raise, so (8 * 4) / (4 * 4) = 2 optimizer steps per epoch.
  config.train.gradient_accumulation_steps = 4
  config.prompt_fn = "simple_animals"
  config.per_prompt_stat_tracking = {"buffer_size": 32, "min_count": 16}
  return config


def prompt_image_alignment() -> ml_collections.ConfigDict:
  """Needs a LLaVA-server: see `reward_kwargs.url`, and the README for other servers."""
  config = compressibility()
  config.num_epochs = 200
  # 8 GPUs * 8 * 6 = 384 images per epoch. (With two GPUs set aside for the server, as in
  # the paper, the other six make 288.)
  config.sample.batch_size = 8
  config.sample.num_batches_per_epoch = 6
  # (8 * 6) / (4 * 6) = 2 optimizer steps per epoch.
  config.train.batch_size = 4
  config.train.gradient_accumulation_steps = 6
  config.prompt_fn = "nouns_activities"
  config.prompt_fn_kwargs = {"nouns_file": "simple_animals.txt",
                             "activities_file": "activities_v0.txt"}
  config.reward_fn = "llava_bertscore"
  config.reward_kwargs = {"url": "http://127.0.0.1:8085"}
  config.per_prompt_stat_tracking = {"buffer_size": 32, "min_count": 16}
  return config


EXPERIMENTS = {f.__name__: f for f in (compressibility, incompressibility, aesthetic,
                                       prompt_image_alignment)}


def get_config(name: str = "compressibility") -> ml_collections.ConfigDict:
  if name not in EXPERIMENTS:
    raise ValueError(f"there is no experiment {name!r}; there are: "
                     f"{', '.join(EXPERIMENTS)}")
  return EXPERIMENTS[name]()
