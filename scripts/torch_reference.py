"""The torch side of scripts/benchmark.py: ddpo-pytorch's algorithm in current libraries.

Sample for sample the same work as ddpo_jax does for the same config, on random weights of the
same shapes: DDIM with the log-probability of each step and guidance in one batch, decoding,
JPEG rewards in threads, advantages, and PPO over LoRA weights (peft) with AdamW. Attention is
torch's scaled_dot_product_attention; half precision is autocast over frozen weights in that
dtype, LoRA in float32. Not a trainer: nothing is saved or logged.
"""

import argparse
from concurrent import futures
import io
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for `configs`

from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402
from diffusers.models.transformers.transformer_2d import Transformer2DModel  # noqa: E402
from diffusers.training_utils import cast_training_params  # noqa: E402
import numpy as np  # noqa: E402
from peft import LoraConfig  # noqa: E402
from PIL import Image  # noqa: E402
import torch  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

from ddpo_jax.benchmark.side import model_configs, peak_rss, serve  # noqa: E402
from ddpo_jax.cli import exit_status, read_config  # noqa: E402
from ddpo_jax.config import Config  # noqa: E402
from ddpo_jax.console import ArgumentParser  # noqa: E402

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRAINING_STEPS = 1000


class TorchSide:
  """One device; batch sizes are those of one device of the config."""

  def __init__(self, cfg: Config, compiled: bool):
    self.cfg = cfg
    self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self.dtype = DTYPES[cfg.mixed_precision]
    torch.backends.cuda.matmul.allow_tf32 = cfg.allow_tf32
    torch.backends.cudnn.allow_tf32 = cfg.allow_tf32
    torch.manual_seed(cfg.seed)
    configs = model_configs(cfg.pretrained.model)
    with self.device:  # drawn there, where that takes no time
      unet = UNet2DConditionModel.from_config(dict(configs["unet"]))
      vae = AutoencoderKL.from_config(dict(configs["vae"]))
      text_encoder = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
    for module in (unet, vae, text_encoder):
      module.requires_grad_(False).eval().to(self.dtype)
    if cfg.use_lora:
      unet.add_adapter(LoraConfig(r=cfg.lora.rank, lora_alpha=cfg.lora.rank,
                                  target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    else:
      unet.requires_grad_(True).float()
    cast_training_params(unet, torch.float32)
    if cfg.train.gradient_checkpointing != "none":
      unet.enable_gradient_checkpointing()
      unet.train()  # where diffusers checkpoints at all; there is no dropout
    self.trained = [p for p in unet.parameters() if p.requires_grad]
    self.vae, self.text_encoder = vae, text_encoder
    if compiled:
      compile_blocks(unet)
    self.unet = unet
    self.config = unet.config
    self.optimizer = torch.optim.AdamW(
        self.trained, lr=cfg.train.learning_rate,
        betas=(cfg.train.adam_beta1, cfg.train.adam_beta2),
        weight_decay=cfg.train.adam_weight_decay, eps=cfg.train.adam_epsilon)
    self.scaler = torch.amp.GradScaler(self.device.type,
                                       enabled=cfg.mixed_precision == "fp16")
    scheduler = configs["scheduler"]
    betas = torch.linspace(scheduler["beta_start"] ** 0.5, scheduler["beta_end"] ** 0.5,
                           TRAINING_STEPS, dtype=torch.float64) ** 2
    self.alphas = torch.cumprod(1 - betas, 0).float().to(self.device)
    stride = TRAINING_STEPS // cfg.sample.num_steps
    self.timesteps = (torch.arange(cfg.sample.num_steps).flip(0) * stride
                      + scheduler.get("steps_offset", 1)).to(self.device)
    self.stride = stride
    self.guided = cfg.sample.guidance_scale > 1

  def describe(self):
    name = (torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu")
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "cores": os.cpu_count()}

  def memory(self):
    on_gpu = self.device.type == "cuda"
    return {"peak_rss_bytes": peak_rss(),
            "peak_device_bytes": torch.cuda.max_memory_allocated() if on_gpu else None}

  def epoch(self):
    started = self.now()
    samples, pending = [], []
    with futures.ThreadPoolExecutor(max_workers=2) as pool:
      for _ in range(self.cfg.sample.num_batches_per_epoch):
        batch, images = self.sample()
        samples.append(batch)
        pending.append(pool.submit(jpeg_rewards, images, self.cfg.reward_fn))
      sampled = self.now()
      rewards = np.concatenate([future.result() for future in pending])
    scored = self.now()
    batch = {name: torch.cat([s[name] for s in samples]) for name in samples[0]}
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    batch["advantages"] = torch.tensor(advantages, dtype=torch.float32, device=self.device)
    self.train(batch)
    trained = self.now()
    if self.device.type == "cuda":
      torch.cuda.empty_cache()  # for the other sides, whose turn it is
    return {"sampling_seconds": sampled - started, "reward_seconds": scored - sampled,
            "training_seconds": trained - scored, "images": len(rewards)}

  def now(self):
    if self.device.type == "cuda":
      torch.cuda.synchronize()
    return time.perf_counter()

  def embed(self, count):
    tokens = torch.zeros(count, 77, dtype=torch.long, device=self.device)
    return self.text_encoder(tokens)[0]

  def autocast(self):
    return torch.autocast(self.device.type, self.dtype,
                          enabled=self.dtype is not torch.float32)

  @torch.no_grad()
  def sample(self):
    count, size = self.cfg.sample.batch_size, self.config.sample_size
    shape = (count, self.config.in_channels, size, size)
    prompts, negative = self.embed(count), self.embed(1)
    latents = torch.randn(shape, device=self.device)
    trajectory, log_probs = [latents], []
    for index in range(len(self.timesteps)):
      t = self.timesteps[index].expand(count)
      with self.autocast():
        noise = self.predict(latents, t, prompts, negative)
      mean, std = self.ddim_mean(latents, t, noise.float())
      latents = mean + std * torch.randn(shape, device=self.device)
      trajectory.append(latents)
      log_probs.append(log_density(latents, mean, std))
    images = []
    for part in latents.split(self.cfg.sample.decode_batch_size):
      images.append(self.vae.decode(
          (part / self.vae.config.scaling_factor).to(self.dtype)).sample.float())
    pixels = ((torch.cat(images) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    batch = {"latents": torch.stack(trajectory[:-1], 1),
             "next_latents": torch.stack(trajectory[1:], 1),
             "log_probs": torch.stack(log_probs, 1), "prompts": prompts,
             "timesteps": self.timesteps.expand(count, -1)}
    return batch, pixels.permute(0, 2, 3, 1).cpu().numpy()

  def predict(self, latents, t, prompts, negative):
    latents = latents.to(self.dtype)
    if not self.guided:
      return self.unet(latents, t, prompts).sample
    both = self.unet(torch.cat([latents] * 2), torch.cat([t] * 2),
                     torch.cat([negative.expand_as(prompts), prompts])).sample
    unconditional, conditional = both.chunk(2)
    return unconditional + self.cfg.sample.guidance_scale * (conditional - unconditional)

  def ddim_mean(self, latents, t, noise):
    """Formulas 12 and 16 of arXiv:2010.02502."""
    column = (-1, 1, 1, 1)
    alpha = self.alphas[t].view(column)
    previous = self.alphas[(t - self.stride).clamp(min=0)].view(column)
    variance = (1 - previous) / (1 - alpha) * (1 - alpha / previous)
    std = self.cfg.sample.eta * variance.clamp(min=1e-20).sqrt()
    clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    direction = (1 - previous - std**2).clamp(min=0).sqrt() * noise
    return previous.sqrt() * clean + direction, std

  def train(self, batch):
    cfg = self.cfg
    trained_steps = cfg.num_train_timesteps
    negative = self.embed(1).detach()
    for _ in range(cfg.train.num_inner_epochs):
      count = len(batch["advantages"])
      order = torch.randperm(count, device=self.device)
      shuffled = {name: value[order] for name, value in batch.items()}
      times = torch.stack([torch.randperm(cfg.sample.num_steps) for _ in range(count)])
      rows = torch.arange(count)[:, None].to(self.device)
      for name in ("latents", "next_latents", "log_probs", "timesteps"):
        shuffled[name] = shuffled[name][rows, times.to(self.device)]
      parts = [{name: value[i:i + cfg.train.batch_size] for name, value in shuffled.items()}
               for i in range(0, count, cfg.train.batch_size)]
      for i, part in enumerate(parts):
        for j in range(trained_steps):
          loss = self.loss(part, j, negative)
          scale = cfg.train.gradient_accumulation_steps * trained_steps
          self.scaler.scale(loss / scale).backward()
        if (i + 1) % cfg.train.gradient_accumulation_steps == 0:
          self.scaler.unscale_(self.optimizer)
          torch.nn.utils.clip_grad_norm_(self.trained, cfg.train.max_grad_norm)
          self.scaler.step(self.optimizer)
          self.scaler.update()
          self.optimizer.zero_grad()

  def loss(self, part, j, negative):
    t = part["timesteps"][:, j]
    with self.autocast():
      noise = self.predict(part["latents"][:, j], t, part["prompts"], negative)
    mean, std = self.ddim_mean(part["latents"][:, j], t, noise.float())
    log_prob = log_density(part["next_latents"][:, j], mean, std)
    limit, clip = self.cfg.train.adv_clip_max, self.cfg.train.clip_range
    advantages = part["advantages"].clamp(-limit, limit)
    ratio = torch.exp(log_prob - part["log_probs"][:, j])
    return torch.maximum(-advantages * ratio,
                         -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()


def compile_blocks(unet):
  """Compiles resnets and transformers, nearly all of its work, once for each shape.

  That takes minutes less than the whole UNet as one graph with its gradient.
  """
  torch._dynamo.config.recompile_limit = 64  # of shapes, with gradients and without
  for module in unet.modules():
    if isinstance(module, (ResnetBlock2D, Transformer2DModel)):
      module.compile(dynamic=False)


def log_density(x, mean, std):
  """Of a Gaussian, averaged over a latent's elements: [B]."""
  density = (-((x.detach() - mean) ** 2) / (2 * std**2) - torch.log(std)
             - 0.5 * float(np.log(2 * np.pi)))
  return density.mean(dim=(1, 2, 3))


def jpeg_rewards(images, reward_fn):
  sign = 1 if reward_fn == "jpeg_incompressibility" else -1
  rewards = []
  for image in images:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    rewards.append(sign * buffer.tell() / 1000)
  return np.array(rewards)


def main(argv):
  parser = ArgumentParser(
      usage="started by scripts/benchmark.py --reference torch", description=__doc__,
      allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--compile", action="store_true", help="with torch.compile")
  options, rest = parser.parse_known_args(argv[1:])
  cfg = read_config([argv[0], *rest])
  serve(lambda: TorchSide(cfg, options.compile))


if __name__ == "__main__":
  sys.exit(exit_status(lambda: main(sys.argv)))
