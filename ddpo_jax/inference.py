"""A finished run -> its fine-tuned model, images from it, and files for other programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import pathlib
import re
import shutil
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from ddpo_jax import build, checkpoint, lora, tracking
from ddpo_jax.config import Config
from ddpo_jax.config import resolve as resolve_config
from ddpo_jax.console import say
from ddpo_jax.diffusion import DDIMSchedule, denoise
from ddpo_jax.models import StableDiffusion, load_pretrained
from ddpo_jax.models.pretrained import find_weights, resolve, save_module
from ddpo_jax.models.vae import to_uint8
from ddpo_jax.prompts import load_lines
from ddpo_jax.types import UserError

_PICTURES = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class FineTuned:
  """What a checkpoint holds, put together with the model that it was trained from."""

  models: StableDiffusion  # the UNet with the trained weights
  cfg: Config  # the run's
  epoch: int  # the last finished one


def load_run(path: str, mixed_precision: str | None = None) -> FineTuned:
  """Loads the model that a run has trained.

  Args:
    path: the run's folder (its newest checkpoint is taken) or one checkpoint in it.
    mixed_precision: what to compute in; the run's own where absent.

  Raises:
    UserError: if there is no checkpoint, or its base model is not there any more.
  """
  run, epoch = checkpoint.find(path)
  cfg = _config_of(run, mixed_precision)
  models = build.load_models(cfg)
  graphdef, params, frozen = lora.partition(models.unet, cfg.use_lora)
  trained = checkpoint.restore_params(run, epoch, params)
  return FineTuned(dataclasses.replace(models, unet=nnx.merge(graphdef, trained, frozen)),
                   cfg, epoch)


def _config_of(run: pathlib.Path, mixed_precision: str | None) -> Config:
  file = run / "config.json"
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
    # The checkpoint's weights replace what these would load.
    values["resume_from"] = values["lora"]["init_from"] = ""
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{file} cannot be read: {error}; must be the config that the run "
                    "wrote") from error
  if mixed_precision is not None:
    values["mixed_precision"] = mixed_precision
  return resolve_config(values)


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
  """How to draw images."""

  num_steps: int
  guidance_scale: float
  eta: float  # in [0, 1]
  seed: int
  batch_size: int


def generate_images(models: StableDiffusion, prompts: Sequence[str],
                    options: SamplingOptions, description: str = "Sampling") -> np.ndarray:
  """Draws an image for each prompt: [N, H, W, 3] uint8.

  Image i depends on the seed, on i and on its prompt, not on the batch size; the same
  seed gives the base and the fine-tuned model the same noise.
  """
  draw = _make_draw(models, options)
  negative = _encode(models.text_encoder, models.tokenize([""]))
  size, images = options.batch_size, []
  for start in tqdm(range(0, len(prompts), size), desc=description, unit="batch",
                    dynamic_ncols=True, disable=None):
    # The last batch is filled up, so that one program serves all.
    indices = np.minimum(np.arange(start, start + size), len(prompts) - 1)
    tokens = models.tokenize([prompts[i] for i in indices])
    batch = draw(models.unet, models.vae, _encode(models.text_encoder, tokens), negative,
                 jnp.asarray(indices))
    images.append(np.asarray(batch)[:len(prompts) - start])
  return np.concatenate(images)


@jax.jit
def _encode(text_encoder: nnx.Module, token_ids: np.ndarray) -> jax.Array:
  return text_encoder(token_ids)


def _make_draw(models: StableDiffusion, options: SamplingOptions) -> Callable[..., Any]:
  schedule = DDIMSchedule.create(models.noise_schedule, options.num_steps)
  scaling_factor = models.scaling_factor

  @jax.jit
  def draw(unet, vae, embeddings, negative, indices):
    fold = functools.partial(jax.random.fold_in, jax.random.key(options.seed))
    latents = denoise(unet, schedule, embeddings, negative, eta=options.eta,
                      guidance_scale=options.guidance_scale, key=jax.vmap(fold)(indices))
    return to_uint8(vae.decode(latents / scaling_factor))

  return draw


def sample_to_files(run: str | None, model: str | None, prompts: Sequence[str],
                    prompts_file: str | None, output: pathlib.Path, compare: bool, seed: int,
                    num_steps: int | None, guidance_scale: float | None, eta: float | None,
                    batch_size: int, mixed_precision: str | None) -> None:
  """What scripts/sample.py does; its arguments.

  Raises:
    UserError: if an argument is out of range, there is no prompt, or the run, the model
      or the output cannot be used.
  """
  prompts = [*prompts, *(load_lines(prompts_file) if prompts_file else [])]
  if not prompts:
    raise UserError("--prompts is empty; give prompts there or with --prompts_file")
  if run is None and model is None:
    raise UserError("--run or --model is missing: what to draw with")
  if compare and run is None:
    raise UserError("--compare needs --run: a fine-tuned model to put beside the base")
  _check_range("--eta", eta, 0, 1)
  _check_range("--num_steps", num_steps, 1, 1000)
  _check_range("--batch_size", batch_size, 1, 10_000)
  _check_range("--guidance_scale", guidance_scale, 0, float("inf"))
  tuned = None if run is None else load_run(run, mixed_precision)
  given = lambda value, of_run, default: (
      value if value is not None else default if tuned is None else of_run(tuned.cfg))
  options = SamplingOptions(
      num_steps=given(num_steps, lambda cfg: cfg.sample.num_steps, 50),
      guidance_scale=given(guidance_scale, lambda cfg: cfg.sample.guidance_scale, 5.0),
      eta=given(eta, lambda cfg: cfg.sample.eta, 1.0), seed=seed,
      batch_size=min(batch_size, len(prompts)))
  dtype = build.DTYPES[given(mixed_precision, lambda cfg: cfg.mixed_precision, "no")]
  columns, captions = [], list(prompts)
  if tuned is None or compare:
    name, revision = (model, None) if tuned is None else (
        tuned.cfg.pretrained.model, tuned.cfg.pretrained.revision)
    assert name is not None  # checked above
    columns.append(generate_images(load_pretrained(name, revision, dtype), prompts, options,
                                   "Base model"))
  if tuned is not None:
    columns.append(generate_images(tuned.models, prompts, options, "Fine-tuned"))
  images = np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])
  if compare:
    captions = [f"{which}: {prompt}" for prompt in prompts for which in ("before", "after")]
  _write(images, captions, output)


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
  if value is not None and not low <= value <= high:
    raise UserError(f"{name}={value} must be in [{low}, {high}]")


def _write(images: np.ndarray, captions: Sequence[str], output: pathlib.Path) -> None:
  """One grid, or a folder of single PNG files, by what `output` ends in."""
  try:
    if output.suffix.lower() in _PICTURES:
      output.parent.mkdir(parents=True, exist_ok=True)
      tracking.image_grid(images, captions).save(output, quality=95)
      return
    output.mkdir(parents=True, exist_ok=True)
    for i, (image, caption) in enumerate(zip(images, captions)):
      words = re.sub(r"[^\w-]+", "_", caption)[:60].strip("_")
      Image.fromarray(image).save(output / f"{i:04d}_{words}.png")
  except OSError as error:
    raise UserError(f"--output={output} cannot be written: {error}") from error


def export(run: str, output: pathlib.Path, file_format: str = "diffusers") -> None:
  """What scripts/export_lora.py does: a LoRA file, or a folder for a whole UNet.

  Raises:
    UserError: if the run cannot be read or the output cannot be written.
  """
  tuned = load_run(run, mixed_precision="no")
  try:
    if tuned.cfg.use_lora:
      output.parent.mkdir(parents=True, exist_ok=True)
      lora.export_lora(tuned.models.unet, output, _metadata(tuned), file_format=file_format)
    else:
      _export_unet(tuned, output)
  except OSError as error:
    raise UserError(f"--output={output} cannot be written: {error}") from error
  say(f"Wrote {output}, from epoch {tuned.epoch} of {run}")


def _metadata(tuned: FineTuned) -> dict[str, str]:
  """What a reader of the file may want to know of how it was made."""
  cfg = tuned.cfg
  rewards = [cfg.reward_fn] if isinstance(cfg.reward_fn, str) else sorted(cfg.reward_fn)
  return {"base_model": cfg.pretrained.model, "base_model_revision": cfg.pretrained.revision,
          "lora_rank": str(cfg.lora.rank), "reward_fn": ", ".join(rewards),
          "epoch": str(tuned.epoch), "seed": str(cfg.seed), "trained_with": "ddpo_jax"}


def _export_unet(tuned: FineTuned, output: pathlib.Path) -> None:
  base = resolve(tuned.cfg.pretrained.model, tuned.cfg.pretrained.revision) / "unet"
  stem = "diffusion_pytorch_model"
  if output.is_dir() and find_weights(base, stem)[0].parent.samefile(output):
    raise UserError(f"--output={output} is the base model's own folder; choose another")
  output.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(base / "config.json", output / "config.json")
  save_module(tuned.models.unet, output / f"{stem}.safetensors")
