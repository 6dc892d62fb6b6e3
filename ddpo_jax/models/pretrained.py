"""Stable Diffusion in diffusers' folder format, CLIP in transformers': folders -> models."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from ddpo_jax import model_config
from ddpo_jax.diffusion.schedule import NoiseSchedule
from ddpo_jax.errors import UserError
from ddpo_jax.messages import one_line
from ddpo_jax.models import hub, weights
from ddpo_jax.models.clip import (
  CLIPConfig,
  CLIPImageConfig,
  CLIPModel,
  CLIPTextConfig,
  CLIPTextModel,
)
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from ddpo_jax.models.vae import AutoencoderKL, VAEConfig
from ddpo_jax.models.weights import LazyModel

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
# A pipeline's networks, by their folders: the module and its config.
PARTS: dict[str, tuple[Any, Any]] = {
    "unet": (UNet2DConditionModel, UNetConfig), "vae": (AutoencoderKL, VAEConfig),
    "text_encoder": (CLIPTextModel, CLIPTextConfig)}


@dataclasses.dataclass
class StableDiffusion:
  """The parts of a text-to-image model."""

  unet: UNet2DConditionModel
  vae: AutoencoderKL
  text_encoder: CLIPTextModel
  tokenizer: Any  # transformers' CLIPTokenizer
  noise_schedule: NoiseSchedule

  @property
  def scaling_factor(self) -> float:
    """Latents are the VAE's code times this."""
    return self.vae.config.scaling_factor

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    """Prompts -> int32 [B, L], padded or cut to the L tokens that the encoder takes.

    Raises:
      TypeError: if they are a single text and not a list.
    """
    return tokenize(self.tokenizer, prompts, self.text_encoder.config.max_position_embeddings)


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
  """Prompts -> int32 [B, length], padded or cut."""
  if isinstance(prompts, str):
    raise TypeError(f"prompts must be a list of texts, not the text {prompts!r:.100}")
  encoded = tokenizer(list(prompts), padding="max_length", truncation=True,
                      max_length=length, return_tensors="np")
  return encoded.input_ids.astype(np.int32)


def load_pretrained(path: str | os.PathLike, revision: str | None = None,
                    dtype: DTypeLike = jnp.float32) -> StableDiffusion:
  """Loads a Stable Diffusion 1.x or 2.x checkpoint.

  Args:
    path: a local folder in diffusers' format, a hub id ("owner/name"), or "tiny" for the
      model in this package.
    revision: branch, tag or commit of a hub id.
    dtype: of the weights and the computation.

  Raises:
    UserError: if the folder, a file or a tensor is missing, misshapen or too many, or if
      a config asks for what is not built here.
  """
  return open_pretrained(path, revision, dtype).read()


def open_pretrained(path: str | os.PathLike, revision: str | None = None,
                    dtype: DTypeLike = jnp.float32, unet_dtype: DTypeLike | None = None
                    ) -> LazyModel[StableDiffusion]:
  """`load_pretrained` without the weights: downloads and checks, so that only these are left.

  Its arguments are the same, and what it raises; `unet_dtype` is the UNet's, if it is another.
  """
  folder = hub.model_folder(path, revision)
  _check_pipeline(folder)
  configs = {name: model_config.read(folder / name / "config.json", config_cls.from_dict)
             for name, (_, config_cls) in PARTS.items()}
  noise_schedule = model_config.read(folder / "scheduler" / "scheduler_config.json",
                                     NoiseSchedule.of_pipeline)
  files = {name: hub.find_weights(folder / name, stem)
           for name, stem in hub.WEIGHT_NAMES.items()}
  tokenizer = _load_tokenizer(folder / "tokenizer")
  _check_parts_fit(folder, **configs, tokens=len(tokenizer))
  dtypes = dict.fromkeys(PARTS, dtype) | ({"unet": unet_dtype} if unet_dtype else {})
  parts = {name: weights.open_module(functools.partial(cls, configs[name], dtype=dtypes[name]),
                                     files[name])
           for name, (cls, _) in PARTS.items()}

  def model(modules: dict[str, Any]) -> StableDiffusion:
    return StableDiffusion(tokenizer=tokenizer, noise_schedule=noise_schedule, **modules)

  return LazyModel(shapes=model({name: part.shapes for name, part in parts.items()}),
                   read=lambda: model({name: part.read() for name, part in parts.items()}))


@dataclasses.dataclass
class CLIP:
  """A CLIP model, and what its folder says of the images that it takes."""

  model: CLIPModel
  images: CLIPImageConfig
  folder: pathlib.Path  # where it was read from


def load_clip(path: str | os.PathLike, revision: str | None = None,
              dtype: DTypeLike = jnp.float32) -> CLIP:
  """Loads a CLIP checkpoint: both towers and their projections.

  Args:
    path: a local folder in transformers' format, or a hub id ("owner/name").
    revision: branch, tag or commit of a hub id.
    dtype: of the weights and the computation; the logit scale is float32 always.

  Raises:
    UserError: if the folder, a file or a tensor is missing, misshapen or too many, or if
      a config asks for what is not built here.
  """
  folder = hub.model_folder(path, revision, hub.CLIP_REPOSITORY)
  config = model_config.read(folder / "config.json", CLIPConfig.from_dict)
  images = _read_image_config(folder, config.vision_config.image_size)
  # The rules for the names of Stable Diffusion's parts would take a prefix away.
  file = hub.find_weights(folder, "model", hub.CLIP_REPOSITORY.weights_class)
  model: Any = weights.load_module(functools.partial(CLIPModel, config, dtype=dtype), file,
                                   renames=())
  return CLIP(model, images, folder)


def load_clip_tokenizer(path: str | os.PathLike):
  """The tokenizer of a CLIP folder or hub id.

  Raises:
    UserError: if there is none.
  """
  return _load_tokenizer(hub.model_folder(path, repository=hub.TOKENIZER_REPOSITORY))


def _read_image_config(folder: pathlib.Path, image_size: int) -> CLIPImageConfig:
  parse = functools.partial(CLIPImageConfig.from_dict, image_size=image_size)
  if (folder / "preprocessor_config.json").is_file():
    return model_config.read(folder / "preprocessor_config.json", parse)
  if (folder / "processor_config.json").is_file():  # transformers 5
    return model_config.read(folder / "processor_config.json",
                             lambda values: parse(values.get("image_processor", {})))
  return parse({})


def _check_parts_fit(folder: pathlib.Path, unet: UNetConfig, vae: VAEConfig,
                     text_encoder: CLIPTextConfig, tokens: int) -> None:
  """Refuses parts of different models in one folder."""
  if text_encoder.hidden_size != unet.cross_attention_dim:
    raise UserError(
        f"{folder}: the text encoder's hidden_size={text_encoder.hidden_size} must equal "
        f"the UNet's cross_attention_dim={unet.cross_attention_dim}")
  if vae.latent_channels != unet.in_channels:
    raise UserError(f"{folder}: the VAE's latent_channels={vae.latent_channels} must "
                    f"equal the UNet's in_channels={unet.in_channels}")
  if tokens > text_encoder.vocab_size:
    raise UserError(f"{folder}: the tokenizer has {tokens} tokens; must be at most the "
                    f"text encoder's vocab_size={text_encoder.vocab_size}")


def _check_pipeline(folder: pathlib.Path) -> None:
  """Refuses a folder that says it is another kind of pipeline."""
  if not (folder / "model_index.json").is_file():
    return
  name = model_config.read_json(folder / "model_index.json").get("_class_name")
  if name not in _PIPELINES:
    raise UserError(f"{folder / 'model_index.json'}: _class_name={name!r} is not "
                    f"supported; must be one of {', '.join(_PIPELINES)}")


def _check_merges(file: pathlib.Path) -> None:
  """Refuses a file without rules, with which every word would become its single letters."""
  try:
    lines = file.read_text(encoding="utf-8").splitlines()
  except (OSError, ValueError) as error:
    raise UserError(f"{file} cannot be read: {one_line(error)}; must be the tokenizer's "
                    "merge rules") from error
  if not any(line.strip() for line in lines if not line.startswith("#version")):
    raise UserError(f"{file} has no merge rules; must have one on each line")


def _load_tokenizer(folder: pathlib.Path):
  # Without torch, transformers says that models need it. Here only its tokenizer is read.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  from transformers import CLIPTokenizer  # slow to import, so only where it is needed

  if not (folder / "tokenizer.json").is_file():  # all that transformers 5 writes
    for name in ("vocab.json", "merges.txt"):
      if not (folder / name).is_file():
        raise UserError(f"{folder / name} does not exist; a tokenizer's folder "
                        "must have it")
    _check_merges(folder / "merges.txt")
  try:
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
  except Exception as error:  # the library raises a different type for each damage
    raise UserError(f"{folder} cannot be read as a CLIP tokenizer: "
                    f"{one_line(error)}") from error
