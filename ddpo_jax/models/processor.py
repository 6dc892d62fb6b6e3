"""3×3 convolutions, products and attention in the form in which processors are quick at them.

XLA hands matrix products to a tuned library there; other operations it compiles itself,
several times slower. So both are written as few, large products, with backward passes of
their own. On GPUs cuDNN has kernels for both, and nothing of this is used.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.config import largest_part
from ddpo_jax.models import winograd

# Winograd's transforms cost more than they save with fewer channels and with more pixels; where
# the kernel's is there already, with more pixels than a quarter of the channels.
_LEAST_CHANNELS, _MOST_PIXELS, _CHANNELS_PER_PIXEL = 32, 16, 4

# Up to so many pixels XLA's convolution is ten times slower than the same as a product, and
# up to so many output channels twice as slow as products that are shifted.
_FEW_PIXELS = 4
_FEW_OUTPUTS = 3
# In half precision products are quicker with so many channels too: for all pixels at once, or
# for so many at a time, whose neighbourhoods stay in the caches.
_MANY_CHANNELS, _SOME_PIXELS, _MANY_PIXELS, _PIXELS_AT_ONCE = 256, 256, 128 * 128, 1024
# With up to so many channels it writes out the neighbourhood of each pixel first.
_FEW_CHANNELS = 16

_MANY_QUERIES = 64  # see `_in_columns`


class Prepared(NamedTuple):
  """What convolutions compute of their kernel alone: once, for many of them."""

  turned: Float[Array, "3 3 O I"]  # by 180°, for the gradient in the input
  transformed: winograd.Transformed


def prepare(kernel: Float[Array, "3 3 I O"]) -> Prepared:
  return Prepared(_turn(kernel), winograd.transform(kernel))


@jax.custom_vjp
def convolve(x: Float[Array, "B h w I"], kernel: Float[Array, "3 3 I O"],
             prepared: Prepared | None = None) -> Float[Array, "B h w O"]:
  """A 3×3 convolution, padded by 1.

  Its gradient in x is another one, of the kernel turned round. JAX's own hands XLA a kernel
  whose axes are exchanged by name only, and inside of a loop that takes five times as long.

  Args:
    x: the input.
    kernel: the kernel.
    prepared: `prepare(kernel)`, where that has been computed outside of a loop; no gradient
      flows into it.
  """
  if _by_winograd(x, kernel, prepared):
    return winograd.convolve(x, _transformed(kernel, prepared))
  return _convolve_otherwise(x, kernel)


def _by_winograd(x: jax.Array, kernel: jax.Array, prepared: Prepared | None) -> bool:
  """Whether Winograd's convolution serves these."""
  height, width = x.shape[1:3]
  channels = min(kernel.shape[2:])
  most = _MOST_PIXELS if prepared is None else max(_MOST_PIXELS, channels // _CHANNELS_PER_PIXEL)
  fits = height % 2 == width % 2 == 0 and height * width <= most
  return fits and x.dtype == jnp.float32 and channels >= _LEAST_CHANNELS


def _transformed(kernel: jax.Array, prepared: Prepared | None) -> winograd.Transformed:
  return winograd.transform(kernel) if prepared is None else prepared.transformed


def favours_product(x: jax.Array, kernel: jax.Array) -> bool:
  """Whether XLA's convolution, which widens half precision, is slower than a product."""
  return _favours_products(x, kernel, _SOME_PIXELS)


def _favours_products(x: jax.Array, kernel: jax.Array, most_pixels: int) -> bool:
  return (x.dtype != jnp.float32 and x.shape[1] * x.shape[2] <= most_pixels
          and min(kernel.shape[2:]) >= _MANY_CHANNELS)


def _convolve_otherwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
  if x.shape[1] * x.shape[2] <= _FEW_PIXELS or favours_product(x, kernel):
    return _as_product(x, kernel)
  if _favours_products(x, kernel, _MANY_PIXELS):
    return _as_products_in_parts(x, kernel)
  if kernel.shape[3] <= _FEW_OUTPUTS:
    return _as_shifted_products(x, kernel)
  if max(kernel.shape[2:]) <= _FEW_CHANNELS and x.shape[2] % 2 == 0:
    return _two_at_once(x, kernel)
  return _convolve_directly(x, kernel)


def _turn(kernel: jax.Array) -> jax.Array:
  return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _as_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same as one matrix product, of each pixel's neighbourhood with the kernel."""
  height, width = x.shape[1:3]
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  around = jnp.concatenate([padded[:, i:i + height, j:j + width]
                            for i in range(3) for j in range(3)], axis=-1)
  rows = around.reshape(-1, around.shape[-1])
  return _product(rows, kernel.reshape(-1, kernel.shape[-1])).reshape(*x.shape[:3], -1)


def _as_products_in_parts(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same for some rows of an image after the other, by a product for each row of windows."""
  batch, height, width, channels = x.shape
  rows = largest_part(height, max(1, _PIXELS_AT_ONCE // width))
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  of_windows = kernel.reshape(3, 3 * channels, -1)

  def of_part(part: jax.Array) -> jax.Array:
    image, first = part // (height // rows), part % (height // rows) * rows
    taken = jax.lax.dynamic_index_in_dim(padded, image, keepdims=False)
    taken = jax.lax.dynamic_slice_in_dim(taken, first, rows + 2)
    beside = jnp.concatenate([taken[:, j:j + width] for j in range(3)], axis=-1)
    beside = jax.lax.optimization_barrier(beside)
    y = sum((_sums("rwi,io->rwo", beside[i:i + rows], of_windows[i]) for i in range(3)),
            jnp.float32(0))
    return y.astype(x.dtype)

  parts = jax.lax.map(of_part, jnp.arange(batch * height // rows))
  return parts.reshape(batch, height, width, -1)


def _gradient_of_product(grad: jax.Array, kernel: jax.Array) -> jax.Array:
  """Of `_as_product` in x: products with the kernel as it lies, shifted and added up."""
  matrix = kernel.reshape(-1, kernel.shape[3])
  products = _sums("ro,co->rc", grad.reshape(-1, grad.shape[-1]), matrix)
  products = products.reshape(*grad.shape[:3], 9, -1)
  return _add_shifted(products, range(9)[::-1]).astype(grad.dtype)


def _as_shifted_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same as one product of each pixel with all nine matrices, shifted and added up."""
  channels = x.shape[3]
  matrix = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
  products = jax.lax.optimization_barrier(x.reshape(-1, channels) @ matrix)
  return _add_shifted(products.reshape(*x.shape[:3], 9, -1), range(9))


def _add_shifted(products: Float[Array, "B h w 9 C"], order: Sequence[int]
                 ) -> Float[Array, "B h w C"]:
  """Adds up those of a pixel's neighbours, row by row, `order` saying which of each one's."""
  height, width = products.shape[1:3]
  parts = jnp.pad(products, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
  return jnp.sum(jnp.stack([
      parts[:, place // 3:place // 3 + height, place % 3:place % 3 + width, which]
      for place, which in enumerate(order)]), axis=0)


def _two_at_once(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same with windows of 3×4, each of which gives two pixels of a row."""
  nowhere = jnp.zeros_like(kernel[:, :1])
  of_both = jnp.concatenate([jnp.concatenate([kernel, nowhere], axis=1),
                             jnp.concatenate([nowhere, kernel], axis=1)], axis=3)
  y = _convolve_directly(x, of_both, strides=(1, 2))
  return y.reshape(*x.shape[:3], kernel.shape[3])


def _convolve_directly(x: jax.Array, kernel: jax.Array,
                       strides: tuple[int, int] = (1, 1)) -> jax.Array:
  return jax.lax.conv_general_dilated(x, kernel, strides, ((1, 1), (1, 1)),
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolve_forward(x: jax.Array, kernel: jax.Array, prepared: Prepared | None
                      ) -> tuple[jax.Array, tuple[Any, ...]]:
  return convolve(x, kernel, prepared), (x, kernel, prepared)


def _convolve_backward(saved: tuple[Any, ...], grad: jax.Array
                       ) -> tuple[jax.Array, jax.Array, None]:
  x, kernel, prepared = saved
  if _by_winograd(grad, kernel, prepared):
    grad_x = winograd.gradient(grad, _transformed(kernel, prepared))
  elif favours_product(grad, kernel):
    grad_x = _gradient_of_product(grad, kernel)
  else:
    grad_x = _convolve_otherwise(grad, _turn(kernel) if prepared is None else prepared.turned)
  of_kernel = jax.linear_transpose(functools.partial(_convolve_directly, x), kernel)
  return grad_x, of_kernel(grad)[0], None


convolve.defvjp(_convolve_forward, _convolve_backward)


def multiply(x: Float[Array, "rows I"], kernel: Float[Array, "I O"]) -> Float[Array, "rows O"]:
  """x @ kernel, whose gradient in the kernel is of x laid out in columns.

  XLA's library multiplies such a matrix twice as fast as one whose axes are exchanged by name.
  """
  # Inside of `jax.shard_map` either may differ between devices alone; its gradient would not
  # have its type. A zero like the other's makes them differ alike, and XLA drops it.
  zero_like = functools.partial(jnp.zeros_like, shape=())
  return _multiply(x + zero_like(kernel), kernel + zero_like(x))


@jax.custom_vjp
def _multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return _product(x, kernel)


def _multiply_forward(x: jax.Array, kernel: jax.Array
                      ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return _product(x, kernel), (x, kernel)


def _multiply_backward(saved: tuple[jax.Array, ...], grad: jax.Array
                       ) -> tuple[jax.Array, jax.Array]:
  x, kernel = saved
  of_x = _sums("ro,io->ri", grad, kernel).astype(grad.dtype)  # with kernel.T it takes twice as long
  return of_x, _product(_transposed(x), grad)


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
  """x @ y with float32 sums, rounded to the factors' dtype.

  Only where it is asked for such sums XLA's library multiplies bfloat16 as it is, twice as fast
  as float32 on a processor that can; else both factors become float32 first.
  """
  return jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(x.dtype)


def _transposed(x: Float[Array, "... n m"]) -> Float[Array, "... m n"]:
  """Laid out anew in memory."""
  return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


@jax.custom_vjp
def attend(query: Float[Array, "B T N H"], key: Float[Array, "B S N H"],
           value: Float[Array, "B S N H"]) -> Float[Array, "B T N H"]:
  """Scaled dot-product attention, with flash attention's backward pass (arXiv:2205.14135).

  That has the sum in softmax's derivative over a head's features instead of over all keys,
  and XLA does not fuse it into the products beside it, which would slow them down tenfold.
  """
  return _attend_forward(query, key, value)[0]


def _attend_forward(query: jax.Array, key: jax.Array, value: jax.Array
                    ) -> tuple[jax.Array, tuple[Any, ...]]:
  query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
  key = key * _scale(query)  # not the query: a loop's keys may be always the same
  forward = _forward_columns if _in_columns(query) else _forward_rows
  weights, out = forward(query, key, value)
  return out.swapaxes(1, 2), (query, key, value, weights, out)


def _attend_backward(saved: tuple[Any, ...], grad: jax.Array
                     ) -> tuple[jax.Array, jax.Array, jax.Array]:
  query, key, value, weights, out = saved
  grad = grad.swapaxes(1, 2)
  mean = jnp.sum(grad * out, axis=-1, dtype=jnp.float32)
  backward = _backward_columns if _in_columns(query) else _backward_rows
  of_query, of_key, of_value = backward(query, key, value, weights, mean, grad)
  return (of_query.swapaxes(1, 2), of_key.swapaxes(1, 2) * _scale(query),
          of_value.swapaxes(1, 2))


attend.defvjp(_attend_forward, _attend_backward)


def _scale(query: jax.Array) -> float:
  return query.shape[-1]**-0.5


def _in_columns(query: Float[Array, "B N T H"]) -> bool:
  """Whether each query has a column of the weights, or a row.

  With columns, the long side of all six products is the queries, and none has both factors
  transposed. That pays with many queries.
  """
  return query.shape[2] >= _MANY_QUERIES


_sums = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)  # see `_product`


def _forward_rows(query: jax.Array, key: jax.Array, value: jax.Array
                  ) -> tuple[jax.Array, jax.Array]:
  weights = jax.nn.softmax(_sums("bnth,bnsh->bnts", query, key)).astype(query.dtype)
  return weights, _product(weights, value)


def _backward_rows(query: jax.Array, key: jax.Array, value: jax.Array, weights: jax.Array,
                   mean: jax.Array, grad: jax.Array
                   ) -> tuple[jax.Array, jax.Array, jax.Array]:
  of_weights = _sums("bnth,bnsh->bnts", grad, value)
  of_scores = (weights * (of_weights - mean[..., None])).astype(query.dtype)
  of_scores = jax.lax.optimization_barrier(of_scores)
  return (_product(of_scores, key), _product(_transposed(of_scores), query),
          _product(_transposed(weights), grad))


def _forward_columns(query: jax.Array, key: jax.Array, value: jax.Array
                     ) -> tuple[jax.Array, jax.Array]:
  # Each product by itself: what XLA fuses them with slows them down.
  apart = jax.lax.optimization_barrier
  scores = apart(_sums("bnsh,bnth->bnst", key, apart(query)))
  weights = apart(jax.nn.softmax(scores, axis=-2).astype(query.dtype))
  out = apart(_product(_transposed(value), weights))
  return weights, out.swapaxes(-1, -2)


def _backward_columns(query: jax.Array, key: jax.Array, value: jax.Array,
                      weights: jax.Array, mean: jax.Array, grad: jax.Array
                      ) -> tuple[jax.Array, jax.Array, jax.Array]:
  apart = jax.lax.optimization_barrier
  grad = apart(grad)
  of_weights = apart(_sums("bnsh,bnth->bnst", value, grad))
  of_scores = apart((weights * (of_weights - mean[..., None, :])).astype(query.dtype))
  of_query = apart(_product(_transposed(key), of_scores))
  return of_query.swapaxes(-1, -2), _product(of_scores, query), _product(weights, grad)
