"""This package's side of the benchmark: the trainer, on random weights."""

from __future__ import annotations

from concurrent import futures
import dataclasses
import functools
import math
import os
import pathlib
import time
from typing import Any

import flax
from flax import nnx
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from PIL import Image

from ddpo_jax import build, glibc, inner_loop, train
from ddpo_jax.benchmark import flops, profile
from ddpo_jax.benchmark.side import EPOCH_PARTS, median_seconds, model_configs, peak_rss
from ddpo_jax.config import Config
from ddpo_jax.devices import (
  configure_devices,
  configure_jax,
  open_in_background,
  peak_memory_bytes,
  plan_batches,
)
from ddpo_jax.diffusion import NoiseSchedule
from ddpo_jax.diffusion.ddim import uses_guidance
from ddpo_jax.diffusion.sampler import native_size
from ddpo_jax.files import expand_home
from ddpo_jax.interrupt import Stop
from ddpo_jax.model_names import TINY
from ddpo_jax.models import LazyModel, StableDiffusion
from ddpo_jax.models.hub import model_folder
from ddpo_jax.models.pretrained import PARTS, load_clip_tokenizer
from ddpo_jax.models.weights import ConstantRngs
from ddpo_jax.prompts import get_prompt_fn
from ddpo_jax.rewards import get_reward, get_rewards
from ddpo_jax.rollout import Rollout


class JaxSide:
  """This package: the trainer as scripts/train.py builds it."""

  def __init__(self, cfg: Config):
    glibc.share_arenas()
    configure_devices()
    configure_jax(cfg)
    self._cfg = cfg
    self._plan = plan_batches(cfg)
    open_in_background()
    model = random_model(cfg)
    self._shapes = model.shapes
    self._trainer = build.build(
        cfg, self._plan, get_prompt_fn(cfg.prompt_fn, **cfg.prompt_fn_kwargs),
        get_rewards(cfg.reward_fn, cfg.reward_kwargs), model)
    self._epoch = 0
    self._last: dict[str, Any] = {}  # what the last epoch took
    self._pool = futures.ThreadPoolExecutor(2)  # as many as the trainer's rewards have

  def describe(self) -> dict[str, Any]:
    device = jax.devices()[0]
    return {"device": device.device_kind, "devices": jax.device_count(),
            "platform": device.platform, "cores": os.cpu_count(), "jax": jax.__version__,
            "jaxlib": jaxlib.__version__, "flax": flax.__version__}

  def first_step(self) -> dict[str, Any]:
    """Start of the process to its first optimizer step, and the first images on the way."""
    return self._run_epoch(first_step_only=True)

  def epoch(self) -> dict[str, Any]:
    """Samples, decodes, scores and trains on one epoch.

    Where a run computes the first optimizer step's gradient while sampling, that is another epoch,
    and in the one whose parts are measured neither does the other's work.
    """
    together = inner_loop.samples_first_step(self._trainer)
    whole = self._run_epoch() if together else None
    apart = self._run_epoch(apart=True)
    of_run = whole or apart
    return {**apart, "epoch_seconds": sum(of_run[f"{part}_seconds"] for part in EPOCH_PARTS),
            "sampler_drift": float(np.maximum(apart["sampler_drift"], of_run["sampler_drift"])),
            "gradient_while_sampling": together}

  def _roll_out(self, apart: bool) -> Rollout:
    """Samples; `apart` without the gradient that a run may compute meanwhile."""
    if apart:
      return self._trainer.worker.run(self._trainer.state.params, self._epoch)
    return inner_loop.roll_out(self._trainer, self._epoch)

  def _run_epoch(self, *, first_step_only: bool = False, apart: bool = False) -> dict[str, Any]:
    trainer = self._trainer
    started = time.perf_counter()
    rollout = self._roll_out(apart)
    sampled = time.perf_counter()
    batch = train.make_batch(trainer, rollout, train.total_rewards(trainer, rollout))
    steps = inner_loop.optimizer_steps(trainer, batch, self._epoch, Stop(), rollout.gradients)
    drift = float(jax.device_get(next(steps)).ratio_drift)
    for metrics in () if first_step_only else steps:
      jax.device_get(metrics)
    self._epoch += 1
    self._last = {
        "sampling_seconds": sampled - started - rollout.reward_seconds,
        "reward_seconds": rollout.reward_seconds,
        "training_seconds": time.perf_counter() - sampled,
        "images": self._plan.samples_per_epoch, "sampler_drift": drift,
        "rescored": (inner_loop.num_steps_rescored(trainer, drift)
                     / self._plan.optimizer_steps_per_epoch)}
    return self._last

  def profile(self) -> dict[str, Any]:
    """Of one more epoch: which operations take how much of sampling and training."""
    trainer = self._trainer
    rollouts = []
    sampling = profile.during(
        lambda: rollouts.append(self._roll_out(apart=True)),
        self._last["sampling_seconds"])
    batch = train.make_batch(trainer, rollouts[0], train.total_rewards(trainer, rollouts[0]))
    training = profile.during(
        lambda: jax.device_get(list(
            inner_loop.optimizer_steps(trainer, batch, self._epoch, Stop()))),
        self._last["training_seconds"])
    self._epoch += 1
    return {"sampling": sampling, "training": training}

  def decode(self) -> dict[str, Any]:
    """The autoencoder alone, as many images at a time as in sampling."""
    unet = self._shapes.unet
    count = min(self._cfg.sample.decode_batch_size, self._cfg.sample.batch_size)
    latents = jnp.ones((count, *native_size(unet), unet.config.in_channels))
    graphdef, weights = nnx.split(_with_random_weights(self._shapes.vae))
    decode = jax.jit(lambda weights, x: nnx.merge(graphdef, weights).decode(x))
    return {"images": count, "seconds": median_seconds(
        lambda: jax.block_until_ready(decode(weights, latents)))}

  def memory(self) -> dict[str, Any]:
    return {"peak_rss_bytes": peak_rss(),
            "peak_device_bytes": peak_memory_bytes()}

  def matmul_peak(self) -> dict[str, Any]:
    """What a large matrix product reaches in the dtype of the networks, in FLOP/s."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), build.DTYPES[self._cfg.mixed_precision])
    product = jax.jit(lambda x: x @ x)
    seconds = median_seconds(lambda: jax.block_until_ready(product(x)), repeats=10, best=True)
    return {"flops_per_second": 2 * size**3 / seconds, "size": size}

  def flops(self) -> dict[str, Any]:
    """Of one sample: counted from the shapes, and by the compiler, in FLOP."""
    unet = nnx.eval_shape(functools.partial(build.prepare_unet, self._cfg), self._shapes.unet)
    return flops.of_models(dataclasses.replace(self._shapes, unet=unet),
                           guided=uses_guidance(self._cfg.sample.guidance_scale),
                           use_lora=self._cfg.use_lora)

  def jpeg(self) -> dict[str, Any]:
    """JPEG rewards of 256 images of 512×512, smooth with some grain, as photographs are."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (32, 32, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((512, 512)), np.int16)
    grain = rng.integers(-8, 9, (256, 512, 512, 1), np.int8)
    images = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    reward = get_reward("jpeg_compressibility")
    one_by_one = lambda: [reward(image[None], [""], [{}]) for image in images]
    in_threads = lambda: list(self._pool.map(
        lambda part: reward(part, [""] * 128, [{}] * 128), (images[:128], images[128:])))
    return {"images": 256, "seconds": median_seconds(in_threads, repeats=1),
            "seconds_one_by_one": median_seconds(one_by_one, repeats=1)}


def random_model(cfg: Config) -> LazyModel[StableDiffusion]:
  """The model that the config names, with random weights: no file is read.

  Time and memory do not depend on the weights' values. (Of a hub id, whatever it is, the
  shapes are Stable Diffusion 1.5's.)
  """
  configs = model_configs(cfg.pretrained.model)
  dtype = build.DTYPES[cfg.mixed_precision]

  def shapes(module: Any, config: Any) -> nnx.Module:
    return nnx.eval_shape(lambda: module(config, dtype=dtype, rngs=ConstantRngs()))

  modules: dict[str, Any] = {name: shapes(module, config.from_dict(configs[name]))
                             for name, (module, config) in PARTS.items()}
  model = StableDiffusion(
      tokenizer=load_clip_tokenizer(_tokenizer_folder(cfg.pretrained.model)),
      noise_schedule=NoiseSchedule.of_pipeline(configs["scheduler"]), **modules)

  def read() -> StableDiffusion:
    drawn: Any = {name: _with_random_weights(module) for name, module in modules.items()}
    return dataclasses.replace(model, **drawn)

  return LazyModel(model, read)


def _tokenizer_folder(model: str) -> pathlib.Path:
  """The model's own if it is here: its encoder may know fewer tokens than the tiny model's has."""
  own = expand_home(model) / "tokenizer"
  return own if own.is_dir() else model_folder(TINY) / "tokenizer"


def _with_random_weights(shapes: nnx.Module) -> Any:
  """Of the size that a trained network's have: normal, of variance 1/fan-in."""
  graphdef, state = nnx.split(shapes)
  # A prime number of them, repeated, so that no two rows of a matrix are the same.
  normal = np.random.default_rng(0).standard_normal(1_048_573, np.float32)

  @functools.cache
  def scaled(fan_in: int, dtype: Any) -> np.ndarray:
    return (normal * fan_in**-0.5).astype(dtype)

  def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if "scale" in name or "bias" in name:
      return jnp.asarray(np.full(leaf.shape, float("scale" in name), leaf.dtype))
    fan_in = max(1, math.prod(leaf.shape[:-1]))
    return jnp.asarray(np.resize(scaled(fan_in, leaf.dtype), leaf.shape))

  return nnx.merge(graphdef, jax.tree.map_with_path(draw, state))
