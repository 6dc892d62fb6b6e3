"""A finished run -> its fine-tuned model, and images from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8
import numpy as np
from tqdm import tqdm

from ddpo_jax import build, checkpoint, lora
from ddpo_jax.compilation import compiler_options
from ddpo_jax.config import Config, resolve
from ddpo_jax.devices import configure_jax, first_device, host_memory
from ddpo_jax.diffusion import DDIMSchedule, denoise
from ddpo_jax.diffusion.sampler import sample_keys
from ddpo_jax.embeddings import PromptEncoder
from ddpo_jax.errors import UserError, renamed
from ddpo_jax.model_names import is_local
from ddpo_jax.models import StableDiffusion
from ddpo_jax.models.hub import WEIGHT_NAMES, find_weights, model_folder
from ddpo_jax.models.placement import place_weights
from ddpo_jax.models.unet import UNet2DConditionModel
from ddpo_jax.models.vae import to_uint8
from ddpo_jax.models.weights import load_module
from ddpo_jax.parts import map_in_parts

# One keeps a GPU busy, and of 8 at a time in float32 decoding is planned to take 4.0 GiB, where
# denoising and decoding one by one take 1.4 (512 × 512 pixels).
_DECODED_AT_ONCE = 1


@dataclasses.dataclass(frozen=True)
class FineTuned:
  """What a checkpoint holds, put together with the model that it was trained from."""

  models: StableDiffusion  # the UNet with the trained weights
  cfg: Config  # the run's
  epoch: int  # the last finished one


def load_run(path: str, mixed_precision: str | None = None, base_model: str | None = None
             ) -> FineTuned:
  """Loads the model that a run has trained, into host memory; sets JAX up as the run had it.

  Args:
    path: the run's folder (its newest checkpoint is taken) or one checkpoint in it.
    mixed_precision: what to compute in; the run's own where absent.
    base_model: where the model that it began with is, if not where it was.

  Raises:
    UserError: if there is no checkpoint, or its base model is not there any more, or JAX finds
      no device.
  """
  run, epoch = checkpoint.find(path, "--run")
  cfg = config_of(run, mixed_precision, base_model)
  first_device()  # if there is none, that is said in one line
  configure_jax(cfg)
  with renamed("pretrained.model", "--base_model" if base_model else "pretrained.model"):
    with host_memory():
      models = build.load_models(cfg)
    graphdef, params, frozen = lora.partition(models.unet, cfg.use_lora)
    trained = checkpoint.restore_params(run, epoch, params)
  return FineTuned(dataclasses.replace(models, unet=nnx.merge(graphdef, trained, frozen)),
                   cfg, epoch)


def load_base_unet(tuned: FineTuned) -> UNet2DConditionModel:
  """The base model's UNet, without any LoRA, in the structure of the fine-tuned one.

  It shares the weights that LoRA leaves as they are; without LoRA it is read again.
  """
  cfg = tuned.cfg
  if cfg.use_lora:
    graphdef, trained, frozen = lora.partition(tuned.models.unet)
    return nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, trained), frozen)
  folder = model_folder(cfg.pretrained.model, cfg.pretrained.revision) / "unet"
  make = functools.partial(UNet2DConditionModel, tuned.models.unet.config, dtype=jnp.float32)
  with host_memory():
    unet: Any = load_module(make, find_weights(folder, WEIGHT_NAMES["unet"]))
    return build.prepare_unet(cfg, unet)


def config_of(run: pathlib.Path, mixed_precision: str | None, base_model: str | None = None
              ) -> Config:
  """The config that a run wrote, to load its checkpoints with; see `load_run`.

  Raises:
    UserError: if it cannot be read, or its base model is not there.
  """
  file = run / "config.json"
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
    # The checkpoint's weights replace what these would load.
    values["resume_from"] = values["lora"]["init_from"] = ""
    model = base_model or str(values["pretrained"]["model"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{file} cannot be read: {error}; must be the config that the run "
                    "wrote") from error
  if mixed_precision is not None:
    values["mixed_precision"] = mixed_precision
  values["pretrained"]["model"] = model
  if os.path.isabs(model) and not is_local(model):
    if base_model:
      raise UserError(f"--base_model={base_model!r} does not exist; must be the run's base model")
    raise UserError(f"the run's base model {model!r} does not exist; must be there, or where "
                    "--base_model says")
  return resolve(values)


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
  """How to draw images; with the defaults of scripts/sample.py for a base model."""

  num_steps: int = 50
  guidance_scale: float = 5.0
  eta: float = 1.0  # in [0, 1]
  seed: int = 0
  batch_size: int = 8


class ImageGenerator:
  """Draws images with a model's text encoder and VAE, and the UNet that it is given.

  Image i depends on the seed, on i and on its prompt, not on the batch size; two UNets are
  given the same noise.
  """

  def __init__(self, models: StableDiffusion, options: SamplingOptions):
    self._encode = PromptEncoder(models)
    self._batch_size = options.batch_size
    self._device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    self._vae = place_weights(nnx.state(models.vae), self._device)
    self._draw = _make_draw(models, options)

  def __call__(self, unet: UNet2DConditionModel, prompts: Sequence[str],
               description: str = "Model") -> np.ndarray:
    """Draws an image for each prompt: [N, H, W, 3] uint8.

    Args:
      unet: the model's, or another one of the same structure.
      prompts: N of them, at least 1.
      description: of the UNet, for the progress bar and the error.

    Raises:
      FloatingPointError: if an image is not all finite numbers; it would be black.
    """
    weights = place_weights(nnx.state(unet), self._device)
    negative = self._encode([""])
    size = min(self._batch_size, len(prompts))
    images = []
    for start in tqdm(range(0, len(prompts), size), desc=description, unit="batch",
                      dynamic_ncols=True, disable=None):
      # The last batch is filled up, so that one program serves all.
      indices = np.minimum(np.arange(start, start + size), len(prompts) - 1)
      embeddings = self._encode([prompts[i] for i in indices])
      batch, finite = self._draw(weights, self._vae, embeddings, negative, indices)
      if not finite:
        raise FloatingPointError(
            f"the {description.lower()} draws images that are not finite numbers")
      images.append(np.asarray(batch)[:len(prompts) - start])
    return np.concatenate(images)


def _make_draw(models: StableDiffusion, options: SamplingOptions) -> Callable[..., Any]:
  schedule = DDIMSchedule.create(models.noise_schedule, options.num_steps)
  unet_graphdef, vae_graphdef = nnx.graphdef(models.unet), nnx.graphdef(models.vae)
  scaling_factor = models.scaling_factor

  def draw(unet: nnx.State, vae: nnx.State, embeddings: Float[Array, "B L D"],
           negative: Float[Array, "1 L D"], indices: Int[Array, " B"]
           ) -> tuple[UInt8[Array, "B H W 3"], Bool[Array, ""]]:
    keys = sample_keys(jax.random.key(options.seed), indices)
    latents = denoise(nnx.merge(unet_graphdef, unet), schedule, embeddings, negative,
                      eta=options.eta, guidance_scale=options.guidance_scale, key=keys)
    decoder = nnx.merge(vae_graphdef, vae)
    images = map_in_parts(lambda x: decoder.decode(x / scaling_factor), _DECODED_AT_ONCE, latents)
    return to_uint8(images), jnp.isfinite(images).all()

  return jax.jit(draw, compiler_options=compiler_options())
