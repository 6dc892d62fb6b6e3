"""Group and layer normalisation, with statistics in float32 and backward passes of their own."""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float
import numpy as np


def _means(x: Float[Array, "*rows C"], num_groups: int | None) -> Float[Array, "*ones C"]:
  """The mean that each element is normalised with: its row's, or its group's of a sample.

  A group's sum is taken over pixels first and then over its channels. Those lie next to
  each other, and taken together the sum is up to nine times slower on CPUs and ten
  times less exact.
  """
  if num_groups is None:
    return x.mean(axis=-1, keepdims=True)
  channels = x.mean(axis=tuple(range(1, x.ndim - 1)), keepdims=True)
  groups = channels.reshape(x.shape[0], num_groups, -1)
  return _groups_to_channels(groups.mean(axis=-1), groups.shape[-1]).reshape(channels.shape)


def _groups_to_channels(groups: Float[Array, "B G"], channels_each: int) -> Float[Array, "B C"]:
  """Each group's value for each of its channels.

  On a CPU as a product with ones and zeros. Of a repetition XLA would look up the
  group of each element of the image, one by one.
  """
  if jax.default_backend() != "cpu":
    return jnp.repeat(groups, channels_each, axis=1)
  return groups @ np.repeat(np.eye(groups.shape[1], dtype=np.float32), channels_each, axis=1)


def _mean_and_variance(x: jax.Array, num_groups: int | None) -> tuple[jax.Array, jax.Array]:
  """Mean and variance of x, in float32, over what `_means` averages.

  For half precision in one pass, as E[x²] − E[x]²: that loses no more than the rounding of x has
  lost before. Otherwise a GPU would read x twice, and write its squared deviations in between.
  """
  exact = x.astype(jnp.float32)
  mean = _means(exact, num_groups)
  if x.dtype == jnp.float32:
    return mean, _means(jnp.square(exact - mean), num_groups)
  return mean, jnp.maximum(_means(jnp.square(exact), num_groups) - jnp.square(mean), 0.0)


def identity(x: jax.Array) -> jax.Array:
  return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def normalize(num_groups: int | None, epsilon: float,
              act: Callable[[jax.Array], jax.Array], dtype: DTypeLike,
              x: Float[Array, "*rows C"], scale: Float[Array, " C"],
              bias: Float[Array, " C"]) -> Float[Array, "*rows C"]:
  """act((x − mean) / deviation · scale + bias), with the backward pass written out.

  That keeps x as it was given, and its means and deviations. What JAX derives keeps x in
  float32 as well, more than once.
  """
  return _forward(num_groups, epsilon, act, dtype, x, scale, bias)[0]


def _affine(x: jax.Array, slope: jax.Array, mean: jax.Array, bias: jax.Array) -> jax.Array:
  return x * slope + (bias - mean * slope)


def _forward(num_groups: int | None, epsilon: float, act: Callable[[jax.Array], jax.Array],
             dtype: DTypeLike, x: jax.Array, scale: jax.Array, bias: jax.Array
             ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  mean, variance = _mean_and_variance(x, num_groups)
  factor = jax.lax.rsqrt(variance + epsilon)
  y = _affine(x.astype(jnp.float32), factor * scale, mean, bias)
  return act(y.astype(dtype)), (x, mean, factor, scale, bias)


def _backward(num_groups: int | None, epsilon: float, act: Callable[[jax.Array], jax.Array],
              dtype: DTypeLike, saved: tuple[jax.Array, ...], grad: jax.Array
              ) -> tuple[jax.Array, jax.Array, jax.Array]:
  del epsilon
  x, mean, factor, scale, bias = saved

  def before_act(x: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x, and the gradient in what the activation was given, in float32."""
    exact = x.astype(jnp.float32)
    y = _affine(exact, factor * scale, mean, bias)
    _, through_act = jax.vjp(act, y.astype(dtype))
    return exact, through_act(grad)[0].astype(jnp.float32)

  # With n = (x − mean)·factor and g = grad·scale: dx = factor·(g − means(g) − n·means(g·n)).
  exact, grad_y = before_act(x, grad)
  products = grad_y * scale, grad_y * scale * exact
  off_cpu = jax.default_backend() != "cpu"
  sums = tuple(map(_sum_pixels if num_groups else _sum_rows, products)) if off_cpu else products
  axes = tuple(range(x.ndim - 1))
  grad_scale, grad_bias = (grad_y * (exact - mean) * factor).sum(axes), grad_y.sum(axes)
  if off_cpu:
    # Computed anew from half precision, or XLA would write it out in float32 above. Of sums
    # only: what comes of them behind the barrier is in kernels that are there anyway.
    x, grad, sums = jax.lax.optimization_barrier((x, grad, sums))
    exact, grad_y = before_act(x, grad)
  summed = x.size // sums[0].size
  mean_grad, mean_product = (_means(x, num_groups) / summed for x in sums)
  slope = (mean_product - mean_grad * mean) * factor**3
  grad_x = grad_y * (scale * factor) - exact * slope + (mean * slope - mean_grad * factor)
  return (grad_x.astype(x.dtype), grad_scale.astype(scale.dtype),
          grad_bias.astype(bias.dtype))


def _sum_rows(x: Float[Array, "*rows C"]) -> Float[Array, "*rows 1"]:
  return x.sum(axis=-1, keepdims=True)


def _sum_pixels(x: Float[Array, "B *pixels C"]) -> Float[Array, "B *ones C"]:
  """Sums in two steps, of which XLA for a GPU fuses the first with the computation of x.

  It does not fuse a sum over all pixels at once: x is then written out in float32 and read again.
  """
  rows = jax.lax.optimization_barrier(x.sum(axis=1, keepdims=True))
  return rows.sum(axis=tuple(range(2, x.ndim - 1)), keepdims=True)


normalize.defvjp(_forward, _backward)
