"""Rewards from CLIP (arXiv:2103.00020), computed on the device in a program of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import pathlib
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np

from ddpo_jax.models import CLIP, load_clip
from ddpo_jax.models.clip import CLIPModel
from ddpo_jax.rewards import aesthetic_head
from ddpo_jax.types import RewardFn, UserError

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_HEAD_REPOSITORY = "trl-lib/ddpo-aesthetic-predictor"
_HEAD_FILE = "aesthetic-model.pth"

# (model, uint8 images [B, H, W, 3], token ids [B, L] or None) -> scores [B] float32.
_Score = Callable[[CLIPModel, jax.Array, jax.Array | None], jax.Array]


def make_aesthetic_score(*, model: str = "openai/clip-vit-large-patch14",
                         revision: str | None = None, head: str | None = None,
                         head_sha256: str | None = aesthetic_head.SHA256,
                         dtype: str = "float32", batch_size: int = 16) -> RewardFn:
  """Makes LAION's aesthetic score, about 1 to 10: a linear map of CLIP's image embedding.

  Args:
    model: CLIP, ViT-L/14 for the public head: a folder in transformers' format or a hub id.
    revision: branch, tag or commit of a hub id.
    head: the predictor's file; downloaded from the hub where absent.
    head_sha256: of that file; None accepts any.
    dtype: "float32", "bfloat16" or "float16", what CLIP computes in.
    batch_size: images scored at a time.

  Raises:
    UserError: if a file is missing or not what it should be, or the head is for another
      CLIP.
  """
  clip = _load("aesthetic_score", model, revision, dtype, batch_size, with_tokenizer=False)
  path = pathlib.Path(head).expanduser() if head else _download_head()
  weight, bias = aesthetic_head.load_head(path, head_sha256)
  width = clip.model.config.projection_dim
  if len(weight) != width:
    raise UserError(f"reward_kwargs.head: {path} takes embeddings of {len(weight)} numbers; "
                    f"must be for {model}, whose embeddings have {width}")
  weight, bias = jnp.asarray(weight, jnp.float32), jnp.float32(bias)

  def score(model: CLIPModel, images: jax.Array, _) -> jax.Array:
    embeddings = _normalized(model.embed_images(preprocess(clip, images)))
    return jnp.dot(embeddings, weight, precision="highest") + bias

  return _reward_fn(clip, score, batch_size)


def make_clip_score(*, model: str = "openai/clip-vit-large-patch14",
                    revision: str | None = None, dtype: str = "float32",
                    batch_size: int = 16) -> RewardFn:
  """Makes CLIPScore (arXiv:2104.08718) as it is mostly reported: max(0, 100·cos), 0 to 100.

  The cosine is that of the image's embedding and its prompt's. Arguments and errors: as
  `make_aesthetic_score`.
  """
  clip = _load("clip_score", model, revision, dtype, batch_size)

  def score(model: CLIPModel, images: jax.Array, token_ids: jax.Array) -> jax.Array:
    return 100.0 * jnp.maximum(_cosine(clip, model, images, token_ids), 0.0)

  return _reward_fn(clip, score, batch_size)


def make_pick_score(*, model: str = "yuvalkirstain/PickScore_v1",
                    revision: str | None = None, dtype: str = "float32",
                    batch_size: int = 16) -> RewardFn:
  """Makes PickScore (arXiv:2305.01569), about 15 to 25: exp(logit_scale)·cos.

  A CLIP-H that was trained on which of two images people preferred for a prompt. Arguments
  and errors: as `make_aesthetic_score`.
  """
  clip = _load("pick_score", model, revision, dtype, batch_size)

  def score(model: CLIPModel, images: jax.Array, token_ids: jax.Array) -> jax.Array:
    return jnp.exp(model.logit_scale[...]) * _cosine(clip, model, images, token_ids)

  return _reward_fn(clip, score, batch_size)


def preprocess(clip: CLIP, images: jax.Array) -> jax.Array:
  """Does what transformers' CLIPImageProcessor does, to within 2/255.

  Resizes the short side to the model's image size with an antialiased bicubic filter,
  rounds to whole values, crops the centre, normalises.

  Args:
    clip: for the image size, mean and standard deviation.
    images: [B, H, W, 3] uint8.

  Returns:
    [B, image_size, image_size, 3] float32.
  """
  size = clip.model.config.vision.image_size
  batch, height, width, channels = images.shape
  short = min(height, width)
  height, width = int(size * height / short), int(size * width / short)
  resized = jax.image.resize(images.astype(jnp.float32), (batch, height, width, channels),
                             method="cubic", antialias=True, precision="highest")
  top, left = (height - size) // 2, (width - size) // 2
  cropped = resized[:, top:top + size, left:left + size]
  unit = jnp.clip(jnp.round(cropped), 0, 255) / 255
  return (unit - jnp.array(clip.image_mean)) / jnp.array(clip.image_std)


def _load(reward: str, model: str, revision: str | None, dtype: str, batch_size: int, *,
          with_tokenizer: bool = True) -> CLIP:
  if dtype not in _DTYPES:
    raise UserError(f"reward_fn={reward!r}, reward_kwargs.dtype={dtype!r} must be one of "
                    f"{', '.join(_DTYPES)}")
  if not isinstance(batch_size, int) or batch_size < 1:
    raise UserError(f"reward_fn={reward!r}, reward_kwargs.batch_size={batch_size!r} must be "
                    "an integer, 1 or more")
  return load_clip(model, revision, _DTYPES[dtype], with_tokenizer=with_tokenizer)


def _download_head() -> pathlib.Path:
  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(_HEAD_REPOSITORY, _HEAD_FILE))
  except Exception as error:  # of several HTTP libraries
    reason = " ".join(str(error).split())[:200]
    raise UserError(f"reward_kwargs.head=None: {_HEAD_FILE} of {_HEAD_REPOSITORY} cannot be "
                    f"downloaded ({reason}); give the path of the file") from error


def _normalized(embeddings: jax.Array) -> jax.Array:
  embeddings = embeddings.astype(jnp.float32)
  return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)


def _cosine(clip: CLIP, model: CLIPModel, images: jax.Array, token_ids: jax.Array
            ) -> jax.Array:
  """Of each image and its text: [B] float32."""
  seen = _normalized(model.embed_images(preprocess(clip, images)))
  said = _normalized(model.embed_texts(token_ids))
  return (seen * said).sum(axis=-1)


def _reward_fn(clip: CLIP, score: _Score, batch_size: int) -> RewardFn:
  """Runs `score` over batches of one size, so that it is compiled once."""
  compiled = jax.jit(score)

  def reward_fn(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]
                ) -> tuple[np.ndarray, dict[str, Any]]:
    del metadata
    count = len(images)
    token_ids = clip.tokenize(prompts) if clip.tokenizer is not None else None
    scores = []
    for start in range(0, count, batch_size):
      chosen = np.minimum(np.arange(start, start + batch_size), count - 1)
      tokens = None if token_ids is None else token_ids[chosen]
      # Not waited for here: the device has the next batch before this one is done.
      scores.append(compiled(clip.model, images[chosen], tokens))
    return np.concatenate([np.asarray(s) for s in scores])[:count], {}

  return reward_fn
