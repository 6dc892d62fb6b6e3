"""Attention in a loop over chunks of queries, so that no buffer grows with T·S."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.parts import largest_divisor


def attend_in_chunks(attend: Callable[..., jax.Array], query: Float[Array, "B T N H"],
                     key: Float[Array, "B S N H"], value: Float[Array, "B S N H"],
                     max_scores: int) -> Float[Array, "B T N H"]:
  """Attention of a few queries at a time, so that T·S scores are never held at once.

  The backward pass computes the scores again. The largest equal chunks are taken that
  have at most `max_scores` scores for each sample and head.
  """
  batch, length, heads, features = query.shape
  chunk = largest_divisor(length, max(1, max_scores // key.shape[1]))
  queries = query.reshape(batch, -1, chunk, heads, features).swapaxes(0, 1)

  # Once more around all of it, so that keys and values are kept as they are, and not in float32.
  @jax.checkpoint
  def attend_to_all(queries: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    wide = key.astype(jnp.float32), value.astype(jnp.float32)  # their gradients' sums are too
    attend_one = lambda query: attend(query, *(x.astype(query.dtype) for x in wide))
    return jax.lax.map(jax.checkpoint(attend_one), queries)

  return attend_to_all(queries, key, value).swapaxes(0, 1).reshape(query.shape)
