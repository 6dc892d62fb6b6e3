"""Prompts -> the embeddings that the UNet attends to."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
from tqdm import tqdm

from ddpo_jax.console import hide_bars, say
from ddpo_jax.messages import shown
from ddpo_jax.models import StableDiffusion
from ddpo_jax.models.clip import CLIPTextModel
from ddpo_jax.models.pretrained import tokenize

_REMEMBERED = 4096  # prompts; half a gigabyte of Stable Diffusion's in half precision


def embedding_shape(text_encoder: CLIPTextModel) -> jax.ShapeDtypeStruct:
  """Shape [1, L, D] and dtype of a prompt's embedding."""
  token_ids = jax.ShapeDtypeStruct((1, text_encoder.config.max_position_embeddings), jnp.int32)
  return jax.eval_shape(lambda encoder, ids: encoder(ids), text_encoder, token_ids)


class PromptEncoder:
  """Embeds every distinct prompt once.

  The text encoder's weights stay in host memory, and are on the device only while there are
  prompts to embed. Prompts are embedded one by one: so an embedding does not depend on those
  embedded with it, not even in its rounding, and a resumed run has the same ones. The first
  prompt that is cut off, because it is too long, causes a warning.
  """

  def __init__(self, models: StableDiffusion):
    self._tokenizer = models.tokenizer  # and not `models`, whose weights need not stay
    self._length = models.text_encoder.config.max_position_embeddings
    graphdef, weights = nnx.split(models.text_encoder)
    self._weights = jax.device_get(weights)

    def encode(weights: nnx.State, token_ids: Int[Array, "1 L"]) -> Float[Array, "1 L D"]:
      return nnx.merge(graphdef, weights)(token_ids)

    self._encode = jax.jit(encode)
    self._said_cut = False
    self._known: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

  def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "B L D"]:
    """The prompts' embeddings, in the encoder's dtype, in host memory."""
    distinct = list(dict.fromkeys(prompts))
    new = [prompt for prompt in distinct if prompt not in self._known]
    embeddings = {prompt: self._known[prompt] for prompt in distinct if prompt in self._known}
    if new:
      weights = jax.device_put(self._weights, jax.local_devices()[0])
      for prompt in tqdm(new, desc="Embedding prompts", leave=False, dynamic_ncols=True,
                         disable=hide_bars(), unit="prompt"):
        self._warn_if_cut(prompt)
        token_ids = tokenize(self._tokenizer, [prompt], self._length)
        embeddings[prompt] = np.asarray(self._encode(weights, token_ids)[0])
    self._known.update(embeddings)
    for prompt in distinct:
      self._known.move_to_end(prompt)
    while len(self._known) > _REMEMBERED:
      self._known.popitem(last=False)
    return np.stack([embeddings[prompt] for prompt in prompts])

  def _warn_if_cut(self, prompt: str) -> None:
    """Says once that a prompt is longer than what the text encoder takes."""
    if self._said_cut:
      return
    count = len(self._tokenizer(prompt, truncation=False, verbose=False).input_ids)
    if count > self._length:
      self._said_cut = True
      say(f"Warning: a prompt has {count} tokens, but the text encoder takes only the first "
          f"{self._length}: the model does not see the end of {shown(prompt)}, nor of other "
          "prompts that are too long")
