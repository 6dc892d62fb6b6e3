"""Scaled dot-product attention as matmuls of a few queries' scores, that stay in the caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.ops.chunked_attention import attend_in_chunks
from ddpo_jax.ops.cpu.matmul import dot, einsum_f32, transpose

# The most scores that are computed at a time, for all samples or for one: what the caches hold.
# There is a score for each pair of a query and a key, in each head of each sample.
_MAX_SCORES = 3 * 2**20
# The most that are computed at a time for queries of one head, where one sample has too many.
_MAX_SCORES_OF_HEAD = 2**20
# From this many queries on each of them has a column of the weights; see `_in_columns`.
_COLUMNS_MIN_QUERIES = 64


def attend(query: Float[Array, "B T N H"], key: Float[Array, "B S N H"],
           value: Float[Array, "B S N H"]) -> Float[Array, "B T N H"]:
  """Attention, by as much at a time as the caches hold."""
  return attend_in_blocks(attend_at_once, query, key, value, _MAX_SCORES, _MAX_SCORES_OF_HEAD)


def attend_in_blocks(attend: Callable[..., jax.Array], query: Float[Array, "B T N H"],
                     key: Float[Array, "B S N H"], value: Float[Array, "B S N H"],
                     max_scores: int, max_scores_of_head: int) -> Float[Array, "B T N H"]:
  """Attention of all samples at a time, of one, or of some queries of one head.

  The largest of these that has at most so many scores. Each score is read several times; from
  memory that takes longer than all matmuls together.
  """
  batch, length, heads, features = query.shape
  scores_of_head = length * key.shape[1]
  if batch * heads * scores_of_head <= max_scores:
    return attend(query, key, value)
  if heads * scores_of_head <= max_scores:
    return jax.lax.map(lambda one: attend(*(x[None] for x in one))[0], (query, key, value))

  def of_head(one: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    query, key, value = one
    return attend_in_chunks(attend, query, key, value, max_scores_of_head)

  by_heads = lambda x: x.swapaxes(1, 2).reshape(batch * heads, 1, x.shape[1], 1, features)
  out = jax.lax.map(of_head, (by_heads(query), by_heads(key), by_heads(value)))
  return out.reshape(batch, heads, length, features).swapaxes(1, 2)


@jax.custom_vjp
def attend_at_once(query: Float[Array, "B T N H"], key: Float[Array, "B S N H"],
                   value: Float[Array, "B S N H"]) -> Float[Array, "B T N H"]:
  """Scaled dot-product attention, with flash attention's backward pass (arXiv:2205.14135).

  That has the sum in softmax's derivative over a head's features instead of over all keys,
  and XLA does not fuse it into the matmuls beside it, which would slow them down tenfold.
  """
  return _forward(query, key, value)[0]


def _forward(query: jax.Array, key: jax.Array, value: jax.Array
             ) -> tuple[jax.Array, tuple[Any, ...]]:
  query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
  key = key * _scale(query)  # not the query: a loop's keys may be always the same
  forward = _forward_columns if _in_columns(query) else _forward_rows
  weights, out = forward(query, key, value)
  return out.swapaxes(1, 2), (query, key, value, weights, out)


def _backward(saved: tuple[Any, ...], grad: jax.Array
              ) -> tuple[jax.Array, jax.Array, jax.Array]:
  query, key, value, weights, out = saved
  grad = grad.swapaxes(1, 2)
  mean = jnp.sum(grad * out, axis=-1, dtype=jnp.float32)
  backward = _backward_columns if _in_columns(query) else _backward_rows
  grad_query, grad_key, grad_value = backward(query, key, value, weights, mean, grad)
  return (grad_query.swapaxes(1, 2), grad_key.swapaxes(1, 2) * _scale(query),
          grad_value.swapaxes(1, 2))


attend_at_once.defvjp(_forward, _backward)


def _scale(query: jax.Array) -> float:
  return query.shape[-1]**-0.5


def _in_columns(query: Float[Array, "B N T H"]) -> bool:
  """Whether each query has a column of the weights, or a row.

  With columns, the long side of all six matmuls is the queries, and none has both factors
  transposed. That pays with many queries.
  """
  return query.shape[2] >= _COLUMNS_MIN_QUERIES


def _forward_rows(query: jax.Array, key: jax.Array, value: jax.Array
                  ) -> tuple[jax.Array, jax.Array]:
  weights = jax.nn.softmax(einsum_f32("bnth,bnsh->bnts", query, key)).astype(query.dtype)
  return weights, dot(weights, value)


def _backward_rows(query: jax.Array, key: jax.Array, value: jax.Array, weights: jax.Array,
                   mean: jax.Array, grad: jax.Array
                   ) -> tuple[jax.Array, jax.Array, jax.Array]:
  grad_weights = einsum_f32("bnth,bnsh->bnts", grad, value)
  grad_scores = (weights * (grad_weights - mean[..., None])).astype(query.dtype)
  grad_scores = jax.lax.optimization_barrier(grad_scores)
  return (dot(grad_scores, key), dot(transpose(grad_scores), query),
          dot(transpose(weights), grad))


def _forward_columns(query: jax.Array, key: jax.Array, value: jax.Array
                     ) -> tuple[jax.Array, jax.Array]:
  # Each matmul by itself: what XLA fuses them with slows them down.
  apart = jax.lax.optimization_barrier
  scores = apart(einsum_f32("bnsh,bnth->bnst", key, apart(query)))
  weights = apart(jax.nn.softmax(scores, axis=-2).astype(query.dtype))
  out = apart(dot(transpose(value), weights))
  return weights, out.swapaxes(-1, -2)


def _backward_columns(query: jax.Array, key: jax.Array, value: jax.Array,
                      weights: jax.Array, mean: jax.Array, grad: jax.Array
                      ) -> tuple[jax.Array, jax.Array, jax.Array]:
  apart = jax.lax.optimization_barrier
  grad = apart(grad)
  grad_weights = apart(einsum_f32("bnsh,bnth->bnst", value, grad))
  grad_scores = apart((weights * (grad_weights - mean[..., None, :])).astype(query.dtype))
  grad_query = apart(dot(transpose(key), grad_scores))
  return grad_query.swapaxes(-1, -2), dot(grad_scores, query), dot(weights, grad)
