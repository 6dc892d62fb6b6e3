"""What --dry_run does: all checks of a run, and what the run would be."""

from __future__ import annotations

import functools
import importlib.util

from flax import nnx

from ddpo_jax import build, distributed
from ddpo_jax.batches import BatchPlan
from ddpo_jax.config import Config
from ddpo_jax.console import say
from ddpo_jax.devices import configure_devices, plan_batches
from ddpo_jax.diffusion.sampler import native_size
from ddpo_jax.messages import in_bytes
from ddpo_jax.model_names import is_local
from ddpo_jax.model_size import model_size, trained_weights
from ddpo_jax.validation import STATE_BYTES, prepare

_GRADIENT_BYTES = 4  # of each trained weight, float32


def dry_run(cfg: Config) -> None:
  """Checks everything, and says what the run would be; makes no folder.

  Raises:
    UserError: a line for each problem.
  """
  distributed.initialize(cfg.distributed)
  configure_devices()
  plan = plan_batches(cfg)
  distributed.check_devices()
  prepared = prepare(cfg)
  _check_model(cfg)
  if cfg.tensorboard and importlib.util.find_spec("tensorboardX") is None:
    say("Warning: tensorboard=True needs tensorboardX, which is not installed: the run would go "
        "on without it; pip install -e '.[tensorboard]'")
  say(plan.describe("The run would be"))
  say(describe_memory(cfg, plan))
  unseen = "" if is_local(cfg.pretrained.model) else (
      f", as far as can be said before {cfg.pretrained.model!r} is downloaded")
  say(f"The config is valid{unseen}; the run would write to {prepared.run}")


def _check_model(cfg: Config) -> None:
  """Opens a model that is here and attaches LoRA, as the run will, without reading its weights."""
  if not is_local(cfg.pretrained.model):
    return
  shapes = build.open_model(cfg).shapes
  nnx.eval_shape(functools.partial(build.prepare_unet, cfg), shapes.unet)
  native_size(shapes.unet)
  build.make_schedule(cfg, shapes.noise_schedule)


def describe_memory(cfg: Config, plan: BatchPlan) -> str:
  """An estimate of each device's memory, from the headers of the model's files."""
  size = model_size(cfg)
  if size is None:
    return (f"Memory per device: not known before {cfg.pretrained.model!r} is downloaded")
  bytes_each = 4 if cfg.mixed_precision == "no" else 2
  trained = trained_weights(cfg, size)
  samples = plan.samples_per_epoch // plan.num_devices
  parts = {
      "the model's weights": size.weights * bytes_each,
      "trained weights, gradient, optimizer": trained * (STATE_BYTES + _GRADIENT_BYTES),
      # Twice: batch by batch as they were sampled, and all of them in one array.
      "trajectories of an epoch": 2 * samples * (cfg.sample.num_steps + 1) * (
          4 * size.latent_size),
      "gradients of single samples, if sampling computes them":
          build.first_gradient_bytes(cfg, plan, trained * _GRADIENT_BYTES),
      "prompts' embeddings": 2 * samples * size.embedding_size * bytes_each}
  lines = [f"  {name} = {in_bytes(value)}" for name, value in parts.items() if value]
  by_batch = [] if build.uses_shared_program(cfg) else ["sample.batch_size"]
  by_batch += ["sample.decode_batch_size", "train.batch_size × train.timesteps_per_batch"]
  return "\n".join([
      f"***** Memory per device: {in_bytes(sum(parts.values()))} plus activations *****", *lines,
      f"  Activations grow with {', '.join(by_batch)}."])
