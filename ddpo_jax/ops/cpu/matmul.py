"""Matmuls that XLA's library for CPUs computes as they are."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Only where it is asked for float32 sums XLA's library multiplies bfloat16 as it is, twice as
# fast as float32 on a CPU that can; else both factors become float32 first.
einsum_f32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def dot(x: Float[Array, "... n k"], y: Float[Array, "... k m"]) -> Float[Array, "... n m"]:
  """x @ y with float32 sums, rounded to the factors' dtype."""
  return jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(x.dtype)


def transpose(x: Float[Array, "... n m"]) -> Float[Array, "... m n"]:
  """Transposed in memory, not by a layout that XLA gives the matmul to read it in."""
  return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


def matmul(x: Float[Array, "rows I"], kernel: Float[Array, "I O"]) -> Float[Array, "rows O"]:
  """x @ kernel, whose gradient in the kernel is of x laid out in columns.

  XLA's library multiplies such a matrix twice as fast as one whose axes are exchanged by name.
  """
  # Inside of `jax.shard_map` either may differ between devices alone; its gradient would not
  # have its type. A zero like the other's makes them differ alike, and XLA drops it.
  zero_like = functools.partial(jnp.zeros_like, shape=())
  return _matmul(x + zero_like(kernel), kernel + zero_like(x))


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return dot(x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return dot(x, kernel), (x, kernel)


def _backward(saved: tuple[Any, ...], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, kernel = saved
  grad_x = einsum_f32("ro,io->ri", grad, kernel).astype(grad.dtype)  # kernel.T takes twice as long
  return grad_x, dot(transpose(x), grad)


_matmul.defvjp(_forward, _backward)
