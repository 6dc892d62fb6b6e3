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
import numpy as np

# Along one axis: which of the 3 weights each of the 2 pixels is multiplied with, for the
# first and for the second of the places that a pixel becomes.
_SUMS = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
# The same from the side of a pixel: it goes to 4 places, with these weights.
_SPREAD = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Up to so many pixels processors are quicker with one matrix product for each place.
_FEW_PIXELS = 16


def kernels_of_places(kernel: Float[Array, "3 3 I O"]) -> Float[Array, "2 2 2 2 I O"]:
  """For each place, by row and column, its 2×2 kernel; summed in float32."""
  exact = kernel.astype(jnp.float32)
  return jnp.einsum("api,bqj,ijco->abpqco", _SUMS, _SUMS, exact).astype(kernel.dtype)


@jax.custom_vjp
def convolve_doubled(x: Float[Array, "B h w I"], kernel: Float[Array, "3 3 I O"],
                     of_places: Float[Array, "2 2 2 2 I O"] | None = None
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
  return (_as_products if _few(x) else _as_convolution)(x, of_places)


def _few(x: jax.Array) -> bool:
  return jax.default_backend() == "cpu" and x.shape[1] * x.shape[2] <= _FEW_PIXELS


def _as_convolution(x: jax.Array, of_places: jax.Array) -> jax.Array:
  """All places as one convolution with four times the outputs."""
  _, height, width, channels = x.shape
  kernel = of_places.transpose(2, 3, 4, 0, 1, 5).reshape(2, 2, channels, -1)
  y = jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)),
                                   dimension_numbers=_LAYOUT)
  y = y.reshape(*y.shape[:3], 2, 2, -1)
  return _interleave([[y[:, a:a + height, b:b + width, a, b] for b in (0, 1)]
                      for a in (0, 1)])


def _as_products(x: jax.Array, of_places: jax.Array) -> jax.Array:
  batch, height, width, channels = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

  def place(a: int, b: int) -> jax.Array:
    around = jnp.concatenate([padded[:, a + i:a + i + height, b + j:b + j + width]
                              for i in (0, 1) for j in (0, 1)], axis=-1)
    rows = jax.lax.optimization_barrier(around).reshape(-1, 4 * channels)
    y = rows @ of_places[a, b].reshape(4 * channels, -1)
    return jax.lax.optimization_barrier(y).reshape(batch, height, width, -1)

  return _interleave([[place(a, b) for b in (0, 1)] for a in (0, 1)])


def _interleave(places: list[list[jax.Array]]) -> jax.Array:
  """[row][column] of [B, h, w, O] -> [B, 2h, 2w, O]."""
  batch, height, width, channels = places[0][0].shape
  rows = [jnp.stack(row, axis=3) for row in places]
  return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)


def _forward(x: jax.Array, kernel: jax.Array, of_places: jax.Array | None
             ) -> tuple[jax.Array, tuple[Any, ...]]:
  return convolve_doubled(x, kernel, of_places), (x, kernel, of_places)


def _backward(saved: tuple[Any, ...], grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
  x, kernel, of_places = saved
  if _few(x):
    places = kernels_of_places(kernel) if of_places is None else of_places
    (grad_x,) = jax.linear_transpose(lambda x: _as_products(x, places), x)(grad)
  else:
    spread = jnp.einsum("ri,sj,ijco->rsoc", _SPREAD, _SPREAD, kernel.astype(jnp.float32))
    grad_x = jax.lax.conv_general_dilated(grad, spread.astype(kernel.dtype), (2, 2),
                                          ((1, 1), (1, 1)), dimension_numbers=_LAYOUT)
  of_kernel = jax.linear_transpose(
      lambda kernel: _as_convolution(x, kernels_of_places(kernel)), kernel)
  return grad_x, of_kernel(grad)[0], None


convolve_doubled.defvjp(_forward, _backward)
