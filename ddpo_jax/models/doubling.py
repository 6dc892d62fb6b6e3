"""A 3×3 convolution of an image doubled by repetition, computed without doubling it.

Its windows of 3×3 see only 2×2 pixels of the image as it was, some of them repeatedly. So
for each of the four places that a pixel becomes there is a kernel of 2×2, sums of the given
one's weights: 4 multiplications where the definition has 9.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.models import processor

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Up to so many pixels processors are quicker with one matrix product for each place.
_FEW_PIXELS = 16


def kernels_of_places(kernel: Float[Array, "3 3 I O"]
                      ) -> tuple[Float[Array, "2 2 I O"], ...]:
  """For each of the four places, row by row, its kernel."""
  places = (_sums_at(kernel.astype(jnp.float32), row, column)
            for row in (0, 1) for column in (0, 1))
  return tuple(place.astype(kernel.dtype) for place in places)


def _sums_at(kernel: jax.Array, row: int, column: int) -> Float[Array, "2 2 I O"]:
  """The kernel of one place."""
  rows = _sums_along(kernel, row)
  return _sums_along(rows.swapaxes(0, 1), column).swapaxes(0, 1)


def _sums_along(weights: jax.Array, place: int) -> jax.Array:
  """The first place sees one pixel once and the next one twice; the second conversely."""
  first, middle, last = weights
  return jnp.stack([first + middle, last] if place else [first, middle + last])


def _spread(kernel: jax.Array) -> Float[Array, "4 4 O I"]:
  """What a pixel is multiplied with on its way to the 4×4 places that it is seen from."""
  rows = _spread_along(kernel.astype(jnp.float32))
  both = _spread_along(rows.swapaxes(0, 1)).swapaxes(0, 1)
  return both.swapaxes(2, 3).astype(kernel.dtype)


def _spread_along(weights: jax.Array) -> jax.Array:
  first, middle, last = weights
  return jnp.stack([last, middle + last, first + middle, first])


@jax.custom_vjp
def convolve_doubled(x: Float[Array, "B h w I"], kernel: Float[Array, "3 3 I O"],
                     of_places: tuple[Float[Array, "2 2 I O"], ...] | None = None
                     ) -> Float[Array, "B 2*h 2*w O"]:
  """The convolution, padded by 1, of x with each pixel repeated in a square of 2×2.

  Args:
    x: the image.
    kernel: the kernel.
    of_places: `kernels_of_places(kernel)`, where that has been computed outside of a loop;
      no gradient flows into it.
  """
  if of_places is None:
    of_places = kernels_of_places(kernel)
  return (_as_products if _few(x, kernel) else _as_convolution)(x, of_places)


def _few(x: jax.Array, kernel: jax.Array) -> bool:
  return jax.default_backend() == "cpu" and (
      x.shape[1] * x.shape[2] <= _FEW_PIXELS or processor.favours_product(x, kernel))


def _as_convolution(x: jax.Array, of_places: tuple[jax.Array, ...]) -> jax.Array:
  """All places as one convolution with four times the outputs."""
  _, height, width, _ = x.shape
  kernel = jnp.concatenate(of_places, axis=-1)
  y = jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)),
                                   dimension_numbers=_LAYOUT)
  y = y.reshape(*y.shape[:3], 2, 2, -1)
  return _interleave([[y[:, a:a + height, b:b + width, a, b] for b in (0, 1)]
                      for a in (0, 1)])


def _as_products(x: jax.Array, of_places: tuple[jax.Array, ...]) -> jax.Array:
  """Each place as one product, of each pixel's neighbourhood with its kernel."""
  batch, height, width, channels = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

  def place(a: int, b: int) -> jax.Array:
    around = jnp.concatenate([padded[:, a + i:a + i + height, b + j:b + j + width]
                              for i in (0, 1) for j in (0, 1)], axis=-1)
    rows = jax.lax.optimization_barrier(around).reshape(-1, 4 * channels)
    y = processor.multiply(rows, of_places[2 * a + b].reshape(4 * channels, -1))
    return jax.lax.optimization_barrier(y).reshape(batch, height, width, -1)

  return _interleave([[place(a, b) for b in (0, 1)] for a in (0, 1)])


def _interleave(places: list[list[jax.Array]]) -> jax.Array:
  """[row][column] of [B, h, w, O] -> [B, 2h, 2w, O]."""
  batch, height, width, channels = places[0][0].shape
  rows = [jnp.stack(row, axis=3) for row in places]
  return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)


def _forward(x: jax.Array, kernel: jax.Array, of_places: tuple[jax.Array, ...] | None
             ) -> tuple[jax.Array, tuple[Any, ...]]:
  return convolve_doubled(x, kernel, of_places), (x, kernel, of_places)


def _backward(saved: tuple[Any, ...], grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
  x, kernel, of_places = saved
  if _few(x, kernel):
    places = kernels_of_places(kernel) if of_places is None else of_places
    _, backward = jax.vjp(lambda x: _as_products(x, places), x)
    (grad_x,) = backward(grad)
  else:
    grad_x = jax.lax.conv_general_dilated(grad, _spread(kernel), (2, 2), ((1, 1), (1, 1)),
                                          dimension_numbers=_LAYOUT)
  of_kernel = jax.linear_transpose(
      lambda kernel: _as_convolution(x, kernels_of_places(kernel)), kernel)
  return grad_x, of_kernel(grad)[0], None


convolve_doubled.defvjp(_forward, _backward)
