"""A finished run -> its fine-tuned model, images from it, and files for other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8
import numpy as np
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from ddpo_jax import build, checkpoint, lora
from ddpo_jax.config import Config
from ddpo_jax.config import resolve as resolve_config
from ddpo_jax.console import say
from ddpo_jax.devices import compiler_options, host_memory
from ddpo_jax.diffusion import DDIMSchedule, denoise
from ddpo_jax.diffusion.sampler import sample_keys
from ddpo_jax.embeddings import PromptEncoder
from ddpo_jax.errors import UserError
from ddpo_jax.files import check_output
from ddpo_jax.images import image_grid
from ddpo_jax.models import StableDiffusion, load_pretrained
from ddpo_jax.models.hub import DIFFUSERS_REPOSITORY, TINY, WEIGHT_NAMES, find_weights, resolve
from ddpo_jax.models.placement import place_weights
from ddpo_jax.models.unet import UNet2DConditionModel
from ddpo_jax.models.vae import to_uint8
from ddpo_jax.models.weights import load_module, save_module
from ddpo_jax.prompts import load_lines

_PICTURES = (".jpg", ".jpeg", ".png")
_LORA_FILE = ".safetensors"


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
  run, epoch = checkpoint.find(path, "--run")
  cfg = _config_of(run, mixed_precision)
  with host_memory():
    models = build.load_models(cfg)
  graphdef, params, frozen = lora.partition(models.unet, cfg.use_lora)
  trained = checkpoint.restore_params(run, epoch, params)
  return FineTuned(dataclasses.replace(models, unet=nnx.merge(graphdef, trained, frozen)),
                   cfg, epoch)


def load_base_unet(tuned: FineTuned) -> UNet2DConditionModel:
  """The UNet that a run began with, in the structure of the fine-tuned one.

  It shares the weights that LoRA leaves as they are; without LoRA it is read again.
  """
  cfg = tuned.cfg
  if cfg.use_lora:
    graphdef, trained, frozen = lora.partition(tuned.models.unet)
    return nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, trained), frozen)
  folder = resolve(cfg.pretrained.model, cfg.pretrained.revision) / "unet"
  make = functools.partial(UNet2DConditionModel, tuned.models.unet.config,
                           dtype=build.DTYPES[cfg.mixed_precision])
  with host_memory():
    unet: Any = load_module(make, find_weights(folder, WEIGHT_NAMES["unet"]))
    return build.prepare_unet(cfg, unet)


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
    images = nnx.merge(vae_graphdef, vae).decode(latents / scaling_factor)
    return to_uint8(images), jnp.isfinite(images).all()

  return jax.jit(draw, compiler_options=compiler_options())


# ---- scripts/sample.py ----


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda x: 0 <= x < 2**31, "must be in [0, 2147483648)"),
    "num_steps": (lambda x: 1 <= x <= 1000, "must be in [1, 1000]"),
    "guidance_scale": (lambda x: 0 <= x < math.inf, "must be a finite number, at least 0"),
    "eta": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "batch_size": (lambda x: 1 <= x <= 10_000, "must be in [1, 10000]"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
  """The options of scripts/sample.py.

  Raises:
    UserError: if one of them is out of range, or they do not fit together.
  """

  output: str | os.PathLike[str]  # a folder wherever it ends in a slash
  run: str | None = None  # this or the next
  model: str | None = None
  prompts: Sequence[str] = ()
  prompts_file: str | None = None
  compare: bool = False
  seed: int = 0
  num_steps: int | None = None  # None, here and below: as in the run
  guidance_scale: float | None = None
  eta: float | None = None
  batch_size: int = 8
  mixed_precision: str | None = None

  def __post_init__(self) -> None:
    if self.run is None and self.model is None:
      raise UserError("--run or --model is missing; one of them must name what to draw with")
    if self.compare and self.run is None:
      raise UserError("--compare needs --run: a fine-tuned model to compare with its base")
    for name, (is_right, text) in _RULES.items():
      value = getattr(self, name)
      if value is not None and not is_right(value):
        raise UserError(f"--{name}={value} {text}")

  @property
  def is_grid(self) -> bool:
    """Whether the output is one picture, by what it ends in; else it is a folder."""
    return not self.is_surely_folder and pathlib.Path(self.output).suffix.lower() in _PICTURES

  @property
  def is_surely_folder(self) -> bool:
    return os.fspath(self.output).endswith(("/", os.sep))

  def sampling_options(self, cfg: Config | None) -> SamplingOptions:
    """What is given, and else what the run was sampled with, if it is one."""
    names = ("num_steps", "guidance_scale", "eta")
    of_run = {} if cfg is None else {name: getattr(cfg.sample, name) for name in names}
    given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
    return SamplingOptions(seed=self.seed, batch_size=self.batch_size, **{**of_run, **given})


def sample_to_files(request: SampleRequest) -> None:
  """What scripts/sample.py does.

  Raises:
    UserError: if there is no prompt, or the run, the model or the output cannot be used.
  """
  prompts = [*request.prompts,
             *(load_lines(request.prompts_file) if request.prompts_file else [])]
  if not prompts:
    raise UserError("--prompts is empty; give prompts there or with --prompts_file")
  output = pathlib.Path(request.output)
  _check_picture_output(request, output)
  try:
    columns = _columns(request, prompts)
  except FloatingPointError as error:
    raise UserError(_not_finite(request, error)) from error
  images = np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])
  captions = prompts
  if request.compare:
    captions = [f"{which}: {prompt}" for prompt in prompts for which in ("before", "after")]
  _write(images, captions, output, is_grid=request.is_grid)
  say(f"Wrote {output}" if request.is_grid else
      f"Wrote {_number(len(images))} to {output}{os.sep}")


def _not_finite(request: SampleRequest, error: FloatingPointError) -> str:
  source = f"--model={request.model}" if request.run is None else f"--run={request.run}"
  return (f"{source}: {error}; the weights or the precision are to blame: must be weights without "
          "NaN, in a precision that they do not overflow, such as --mixed_precision=no")


def _columns(request: SampleRequest, prompts: Sequence[str]) -> list[np.ndarray]:
  """The prompts' images of each of the models asked for."""
  say(f"Reading the model of {request.run or request.model}")
  if request.run is None:
    assert request.model is not None  # checked by the request
    with host_memory():
      models = _load_base(request.model, build.DTYPES[request.mixed_precision or "no"])
    generate = _generator(models, request.sampling_options(None), len(prompts))
    return [generate(models.unet, prompts, "Base model")]
  tuned = load_run(request.run, request.mixed_precision)
  options = request.sampling_options(tuned.cfg)
  generate = _generator(tuned.models, options, len(prompts) * (2 if request.compare else 1))
  columns = [generate(load_base_unet(tuned), prompts, "Base model")] if request.compare else []
  return [*columns, generate(tuned.models.unet, prompts, "Fine-tuned model")]


def _generator(models: StableDiffusion, options: SamplingOptions, count: int) -> ImageGenerator:
  """Says what takes long from here on, and makes the generator."""
  say(f"Compiling, and sampling {_number(count)} in {options.num_steps} steps")
  return ImageGenerator(models, options)


def _number(images: int) -> str:
  return "1 image" if images == 1 else f"{images} images"


def _load_base(model: str, dtype: DTypeLike) -> StableDiffusion:
  if model == TINY:
    return load_pretrained(model, dtype=dtype)
  named = dataclasses.replace(DIFFUSERS_REPOSITORY, field="--model")  # in its messages
  return load_pretrained(resolve(model, repository=named), dtype=dtype)


def _check_picture_output(request: SampleRequest, output: pathlib.Path) -> None:
  """Refuses, before anything is loaded, what could not be written."""
  is_folder = request.is_surely_folder or not request.is_grid and (
      output.suffix.lower() not in Image.registered_extensions() or output.is_dir())
  if not (is_folder or request.is_grid):
    raise UserError(f"--output={output} must end in {', '.join(_PICTURES)} for one grid, or "
                    "be the name of a folder for single files")
  check_output(f"--output={output!s:.200}", output, is_folder=not request.is_grid)


def _write(images: np.ndarray, captions: Sequence[str], output: pathlib.Path, *,
           is_grid: bool) -> None:
  """One grid, or a folder of single PNG files."""
  try:
    if is_grid:
      output.parent.mkdir(parents=True, exist_ok=True)
      image_grid(images, captions).save(output, quality=95)
      return
    output.mkdir(parents=True, exist_ok=True)
    for i, (image, caption) in enumerate(zip(images, captions)):
      words = re.sub(r"[^\w-]+", "_", caption)[:60].strip("_")
      Image.fromarray(image).save(output / f"{i:04d}_{words}.png")
  except OSError as error:
    raise UserError(f"--output={output} cannot be written: {error}") from error


# ---- scripts/export_lora.py ----


def export(run: str, output: pathlib.Path, file_format: str = "diffusers") -> None:
  """What scripts/export_lora.py does: a LoRA file, or a folder for a whole UNet.

  Raises:
    UserError: if the run cannot be read or the output cannot be written.
  """
  folder, _ = checkpoint.find(run, "--run")
  _check_export(_config_of(folder, "no"), output, file_format)
  tuned = load_run(run, mixed_precision="no")
  try:
    if tuned.cfg.use_lora:
      output.parent.mkdir(parents=True, exist_ok=True)
      lora.export_lora(tuned.models.unet, output, _metadata(tuned), file_format=file_format)
    else:
      _export_unet(tuned, output)
  except (OSError, SafetensorError) as error:
    raise UserError(f"--output={output} cannot be written: {error}") from error
  say(f"Wrote {output}: {run} after {tuned.epoch + 1} epochs")


def _check_export(cfg: Config, output: pathlib.Path, file_format: str) -> None:
  """Refuses, before anything is loaded, an output that does not suit the run."""
  if not cfg.use_lora:
    whole = "the run has use_lora=False, so its whole UNet is written, as a diffusers folder"
    if file_format != "diffusers":
      raise UserError(f"--format={file_format}: {whole}; must be diffusers")
    if output.suffix.lower() == _LORA_FILE:
      raise UserError(f"--output={output}: {whole}; must be the name of a folder")
  check_output(f"--output={output!s:.200}", output, is_folder=not cfg.use_lora)
  if cfg.use_lora and output.suffix.lower() != _LORA_FILE:
    raise UserError(f"--output={output} must end in {_LORA_FILE}, which is what is written; "
                    f"such as {output.with_suffix(_LORA_FILE)}")


def _metadata(tuned: FineTuned) -> dict[str, str]:
  """What a reader of the file may want to know of how it was made."""
  cfg = tuned.cfg
  rewards = [cfg.reward_fn] if isinstance(cfg.reward_fn, str) else sorted(cfg.reward_fn)
  # The weights' own: a run that began with lora.init_from has the rank of that file.
  ranks = {linear.lora_down.shape[1] for _, linear in
           lora.attention_projections(tuned.models.unet) if linear.lora_down is not None}
  return {"base_model": cfg.pretrained.model, "base_model_revision": cfg.pretrained.revision,
          "lora_rank": ", ".join(map(str, sorted(ranks))), "reward_fn": ", ".join(rewards),
          "epoch": str(tuned.epoch), "seed": str(cfg.seed), "trained_with": "ddpo_jax"}


def _export_unet(tuned: FineTuned, output: pathlib.Path) -> None:
  base = resolve(tuned.cfg.pretrained.model, tuned.cfg.pretrained.revision) / "unet"
  stem = WEIGHT_NAMES["unet"]
  if output.is_dir() and find_weights(base, stem)[0].parent.samefile(output):
    raise UserError(f"--output={output} is the base model's own folder; choose another")
  output.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(base / "config.json", output / "config.json")
  save_module(tuned.models.unet, output / f"{stem}.safetensors")
