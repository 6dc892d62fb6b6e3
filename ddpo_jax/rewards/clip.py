"""Rewards from CLIP embeddings, computed on the device: aesthetics and alignment.

Each is made by a function of keyword arguments (`config.reward_kwargs`), which loads the
model once. Scores are computed by one jitted program in batches of a fixed size, on the
first device of each process, whatever threads ask for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import os
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ddpo_jax.errors import UserError, said_of
from ddpo_jax.models import CLIP, load_clip, load_clip_tokenizer
from ddpo_jax.models.clip import CLIPImageConfig, CLIPModel, CLIPTextConfig
from ddpo_jax.models.pretrained import tokenize
from ddpo_jax.parts import ceil_div
from ddpo_jax.rewards.aesthetic_head import HEAD_SHA256, AestheticHead, load_aesthetic_head
from ddpo_jax.rewards.arguments import check_count
from ddpo_jax.types import RewardFn

VIT_L_14 = "openai/clip-vit-large-patch14"
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
DTYPES = ("float32", "bfloat16", "float16")


def make_aesthetic_score(*, model: str = VIT_L_14, revision: str | None = None,
                         head: str | None = None, head_sha256: str = HEAD_SHA256,
                         dtype: str = "float32", batch_size: int = 16) -> RewardFn:
  """How much people like an image: LAION's predictor on its CLIP embedding.

  The mean rating from 1 to 10 that people would give; values outside occur. Prompts are
  not used.

  Args:
    model: folder or hub id of the CLIP model that the head was trained on.
    revision: branch, tag or commit of a hub id.
    head: the head's file, a torch pickle that is read without running it; downloaded
      from the hub if absent.
    head_sha256: of that file; to be given for another head than the public one.
    dtype: that the model computes in: float32, bfloat16 or float16. The head's is float32.
    batch_size: images scored at a time, at most; bounds the memory.

  Raises:
    UserError: if an argument is wrong, or the model or the head cannot be loaded.
  """
  _check_arguments(dtype, batch_size)
  with said_of("reward_kwargs.head", head):
    predictor = load_aesthetic_head(head, head_sha256)  # first: it is small
  clip = _load_clip(model, revision, dtype)
  width = clip.model.config.projection_dim
  if width != predictor.in_features:
    raise UserError(f"reward_kwargs.model={model!r} makes embeddings of {width} numbers; "
                    f"must be {predictor.in_features}, which the head takes")
  del clip.model.text_model, clip.model.text_projection  # a third of the memory
  program = _Program(_aesthetic_score, clip.images, (clip.model, predictor), dtype, batch_size)
  return lambda images, prompts, metadata: (program(images), {})


def make_clip_score(*, model: str = VIT_L_14, revision: str | None = None,
                    tokenizer: str | None = None, dtype: str = "float32",
                    batch_size: int = 16) -> RewardFn:
  """How well an image fits its prompt: CLIPScore (arXiv:2104.08718).

  100 times the cosine of the two embeddings, and 0 where that is negative: 0 to 100, of
  which about 15 (nothing in common) to 40 occur.

  Args:
    model: folder or hub id of a CLIP model.
    revision: branch, tag or commit of a hub id.
    tokenizer: folder or hub id of its tokenizer; in the model's folder if absent.
    dtype: that the model computes in: float32, bfloat16 or float16.
    batch_size: images scored at a time, at most; bounds the memory.

  Raises:
    UserError: if an argument is wrong, or the model or its tokenizer cannot be loaded.
  """
  _check_arguments(dtype, batch_size)
  clip = _load_clip(model, revision, dtype)
  return _text_and_image_reward(_clip_score, clip, tokenizer or clip.folder, dtype,
                                batch_size)


def make_pick_score(*, model: str = PICKSCORE, revision: str | None = None,
                    tokenizer: str | None = None, dtype: str = "float32",
                    batch_size: int = 16) -> RewardFn:
  """Which image people would pick for a prompt: PickScore (arXiv:2305.01569).

  The cosine of the two embeddings times the model's logit scale (100): -100 to 100, of
  which about 15 to 25 occur.

  Args:
    model: folder or hub id of a CLIP model trained on people's choices.
    revision: branch, tag or commit of a hub id.
    tokenizer: folder or hub id of its tokenizer. If absent, the one in the model's
      folder, or for the default model that of the CLIP-H which it was trained from.
    dtype: that the model computes in: float32, bfloat16 or float16.
    batch_size: images scored at a time, at most; bounds the memory.

  Raises:
    UserError: if an argument is wrong, or the model or its tokenizer cannot be loaded.
  """
  _check_arguments(dtype, batch_size)
  clip = _load_clip(model, revision, dtype)
  if tokenizer is None and model == PICKSCORE and not _has_tokenizer(clip):
    tokenizer = PICKSCORE_TOKENIZER
  return _text_and_image_reward(_pick_score, clip, tokenizer or clip.folder, dtype,
                                batch_size)


def _load_clip(model: str, revision: str | None, dtype: str) -> CLIP:
  with said_of("reward_kwargs.model", model):
    return load_clip(model, revision, jnp.dtype(dtype))


def resize_and_crop(images: np.ndarray, config: CLIPImageConfig) -> np.ndarray:
  """Images as large as the vision tower takes them; on the host, by Pillow.

  With `normalise_pixels` this is what transformers' CLIPImageProcessor computes.

  Args:
    images: [B, H, W, 3] uint8.
    config: how large.

  Returns:
    [B, S, S, 3] uint8, S the config's `crop_to`.
  """
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
    raise ValueError(f"{images.dtype=} and {images.shape=} must be uint8 [B, H, W, 3]")
  height, width = images.shape[1:3]
  size, crop = config.resize_to, config.crop_to
  if isinstance(size, int):
    short = min(height, width)
    size = (int(size * height / short), int(size * width / short))
  top, left = ((side - crop) // 2 for side in size)
  resize = lambda image: Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
  return np.stack([np.asarray(resize(image))[top:top + crop, left:left + crop]
                   for image in images])


def normalise_pixels(images: jax.Array, config: CLIPImageConfig) -> jax.Array:
  """[B, S, S, 3] uint8 -> float32, standardised by CLIP's mean and std of each channel."""
  x = images.astype(jnp.float32) / 255
  return (x - jnp.float32(config.mean)) / jnp.float32(config.std)


def _aesthetic_score(networks: tuple[CLIPModel, AestheticHead], images: jax.Array) -> jax.Array:
  model, head = networks
  return head(_normalise(model.embed_images(images)))


def _clip_score(model: CLIPModel, images: jax.Array, token_ids: jax.Array) -> jax.Array:
  return jnp.maximum(100 * _cosine(model, images, token_ids), 0)


def _pick_score(model: CLIPModel, images: jax.Array, token_ids: jax.Array) -> jax.Array:
  return jnp.exp(model.logit_scale[...]) * _cosine(model, images, token_ids)


def _cosine(model: CLIPModel, images: jax.Array, token_ids: jax.Array) -> jax.Array:
  """Of each image with its own text: [B, S, S, 3], [B, L] -> [B] float32."""
  return jnp.sum(_normalise(model.embed_images(images)) *
                 _normalise(model.embed_texts(token_ids)), axis=-1)


def _normalise(embeddings: jax.Array) -> jax.Array:
  embeddings = embeddings.astype(jnp.float32)
  return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)


def _text_and_image_reward(score: Callable[..., jax.Array], clip: CLIP,
                           tokenizer: str | os.PathLike, dtype: str, batch_size: int
                           ) -> RewardFn:
  config = clip.model.config.text_config
  to_token_ids = _Tokenize(load_clip_tokenizer(tokenizer), tokenizer, config)
  program = _Program(score, clip.images, clip.model, dtype, batch_size)
  return lambda images, prompts, metadata: (program(images, to_token_ids(prompts)), {})


class _Tokenize:
  """Prompts -> int32 [B, L], padded or cut to the L tokens that the text tower takes."""

  def __init__(self, tokenizer: Any, source: str | os.PathLike, config: CLIPTextConfig):
    if len(tokenizer) > config.vocab_size:
      raise UserError(f"reward_kwargs.tokenizer={str(source)!r} has {len(tokenizer)} tokens;"
                      f" must be at most the model's vocab_size={config.vocab_size}")
    if config.eos_token_id not in (2, tokenizer.eos_token_id):
      raise UserError(f"reward_kwargs.tokenizer={str(source)!r} ends a text with token "
                      f"{tokenizer.eos_token_id}; must be the model's eos_token_id="
                      f"{config.eos_token_id}")
    self._tokenizer = tokenizer
    self._length = config.max_position_embeddings
    self._lock = threading.Lock()  # padding and cutting are the tokenizer's state

  def __call__(self, prompts: Sequence[str]) -> np.ndarray:
    with self._lock:
      return tokenize(self._tokenizer, prompts, self._length)


class _Program:
  """Scores any number of images, in batches, on one device. May be called by any thread."""

  def __init__(self, score: Callable[..., jax.Array], images: CLIPImageConfig,
               networks: Any, dtype: str, batch_size: int):
    """Puts the networks on the device.

    Args:
      score: `(networks, pixels [B, S, S, 3] float32, …) -> [B] float32`.
      images: how images become pixels.
      networks: a pytree, such as a module or a tuple of modules.
      dtype: that the networks compute in.
      batch_size: at most so many images at a time.
    """
    self._device = jax.local_devices()[0]
    self._images = images
    self._networks = jax.device_put(networks, self._device)
    self._batch_size = batch_size

    def program(networks: Any, batch: jax.Array, *inputs: jax.Array) -> jax.Array:
      # Not the process's own setting, which may let a GPU round float32 to TF32.
      precision = "highest" if dtype == "float32" else "default"
      with jax.default_matmul_precision(precision):
        return score(networks, normalise_pixels(batch, images), *inputs)

    self._program = jax.jit(program)

  def __call__(self, images: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
    """Scores images: [B, H, W, 3] uint8, and arrays [B, …], -> [B] float32; B from 1."""
    count = len(images)
    batches = ceil_div(count, self._batch_size)
    size = ceil_div(count, batches)  # equal batches: least of the last one is padding
    scores = []
    for start in range(0, count, size):
      chosen, *others = (x[start:start + size] for x in (images, *inputs))
      batch = [_pad(x, size) for x in (resize_and_crop(chosen, self._images), *others)]
      scores.append(self._program(self._networks, *jax.device_put(batch, self._device)))
    return np.concatenate(jax.device_get(scores))[:count]


def _pad(x: np.ndarray, size: int) -> np.ndarray:
  return np.pad(x, ((0, size - len(x)),) + ((0, 0),) * (x.ndim - 1), mode="edge")


def _has_tokenizer(clip: CLIP) -> bool:
  return any((clip.folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def _check_arguments(dtype: str, batch_size: int) -> None:
  if dtype not in DTYPES:
    raise UserError(f"reward_kwargs.dtype={dtype!r} must be one of {', '.join(DTYPES)}")
  check_count("batch_size", batch_size)
