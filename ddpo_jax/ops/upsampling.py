"""A 3×3 convolution of an image upsampled by nearest neighbours, without the larger image.

Its windows of 3×3 see only 2×2 pixels of the image as it was, some of them repeatedly. So
for each of the four subpixels that a pixel becomes there is a kernel of 2×2, sums of the given
one's weights: 4 multiplications where the definition has 9.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.ops.cpu.convolution import favors_im2col
from ddpo_jax.ops.cpu.matmul import matmul

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Up to so many pixels CPUs are quicker with one matrix product for each subpixel.
_FEW_PIXELS = 16


class Prepared(NamedTuple):
  """The kernels that a kernel of 3×3 comes to: computed once, for many convolutions."""

  subpixel: tuple[Float[Array, "2 2 I O"], ...]  # of each subpixel, row by row, for products
  joined: Float[Array, "2 2 I 4*O"]  # all of these, for one convolution
  transposed: Float[Array, "4 4 O I"]  # for the gradient in the input


def prepare(kernel: Float[Array, "3 3 I O"]) -> Prepared:
  subpixel = _subpixel_kernels(kernel)
  return Prepared(subpixel, jnp.concatenate(subpixel, axis=-1), _transposed_kernel(kernel))


def _subpixel_kernels(kernel: Float[Array, "3 3 I O"]
                      ) -> tuple[Float[Array, "2 2 I O"], ...]:
  """The kernel of each of the four subpixels, row by row."""
  kernels = (_sums_at(kernel.astype(jnp.float32), row, column)
             for row in (0, 1) for column in (0, 1))
  return tuple(sums.astype(kernel.dtype) for sums in kernels)


def _sums_at(kernel: jax.Array, row: int, column: int) -> Float[Array, "2 2 I O"]:
  """The kernel of one subpixel."""
  rows = _sums_along(kernel, row)
  return _sums_along(rows.swapaxes(0, 1), column).swapaxes(0, 1)


def _sums_along(weights: jax.Array, second: int) -> jax.Array:
  """The first subpixel sees one pixel once and the next one twice; the second conversely."""
  first, middle, last = weights
  return jnp.stack([first + middle, last] if second else [first, middle + last])


def _transposed_kernel(kernel: jax.Array) -> Float[Array, "4 4 O I"]:
  """What a pixel is multiplied with on its way to the 4×4 places that it is seen from."""
  rows = _transposed_along_axis(kernel.astype(jnp.float32))
  both = _transposed_along_axis(rows.swapaxes(0, 1)).swapaxes(0, 1)
  return both.swapaxes(2, 3).astype(kernel.dtype)


def _transposed_along_axis(weights: jax.Array) -> jax.Array:
  """The weights with which a pixel reaches the four places, along the first axis: 3 -> 4."""
  first, middle, last = weights
  return jnp.stack([last, middle + last, first + middle, first])


@jax.custom_vjp
def upsample_and_convolve(x: Float[Array, "B h w I"], kernel: Float[Array, "3 3 I O"],
                          prepared: Prepared | None = None) -> Float[Array, "B 2*h 2*w O"]:
  """The convolution, padded by 1, of x with each pixel repeated in a square of 2×2.

  Args:
    x: the image.
    kernel: the kernel.
    prepared: `prepare(kernel)`, where that has been computed outside of a loop; no gradient
      flows into it.
  """
  if prepared is None:
    prepared = prepare(kernel)
  if _on_cpu_as_products(x, kernel):
    return _as_products(x, prepared.subpixel)
  return _as_convolution(x, prepared.joined)


def _on_cpu_as_products(x: jax.Array, kernel: jax.Array) -> bool:
  return jax.default_backend() == "cpu" and (
      x.shape[1] * x.shape[2] <= _FEW_PIXELS or favors_im2col(x, kernel))


def _as_convolution(x: jax.Array, joined: jax.Array) -> jax.Array:
  """All subpixels as one convolution with four times the outputs."""
  _, height, width, _ = x.shape
  y = jax.lax.conv_general_dilated(x, joined, (1, 1), ((1, 1), (1, 1)),
                                   dimension_numbers=_LAYOUT)
  y = y.reshape(*y.shape[:3], 2, 2, -1)
  return _depth_to_space([[y[:, a:a + height, b:b + width, a, b] for b in (0, 1)]
                          for a in (0, 1)])


def _as_products(x: jax.Array, subpixel: tuple[jax.Array, ...]) -> jax.Array:
  """Each subpixel as one product, of each pixel's neighbourhood with its kernel."""
  batch, height, width, channels = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

  def subpixel_at(a: int, b: int) -> jax.Array:
    around = jnp.concatenate([padded[:, a + i:a + i + height, b + j:b + j + width]
                              for i in (0, 1) for j in (0, 1)], axis=-1)
    rows = jax.lax.optimization_barrier(around).reshape(-1, 4 * channels)
    y = matmul(rows, subpixel[2 * a + b].reshape(4 * channels, -1))
    return jax.lax.optimization_barrier(y).reshape(batch, height, width, -1)

  return _depth_to_space([[subpixel_at(a, b) for b in (0, 1)] for a in (0, 1)])


def _depth_to_space(subpixels: list[list[jax.Array]]) -> jax.Array:
  """[row][column] of [B, h, w, O] -> [B, 2h, 2w, O]."""
  batch, height, width, channels = subpixels[0][0].shape
  rows = [jnp.stack(row, axis=3) for row in subpixels]
  return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)


def _forward(x: jax.Array, kernel: jax.Array, prepared: Prepared | None
             ) -> tuple[jax.Array, tuple[Any, ...]]:
  return upsample_and_convolve(x, kernel, prepared), (x, kernel, prepared)


def _backward(saved: tuple[Any, ...], grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
  x, kernel, prepared = saved
  kernels = prepare(kernel) if prepared is None else prepared
  if _on_cpu_as_products(x, kernel):
    _, backward = jax.vjp(lambda x: _as_products(x, kernels.subpixel), x)
    (grad_x,) = backward(grad)
  else:
    grad_x = jax.lax.conv_general_dilated(grad, kernels.transposed, (2, 2), ((1, 1), (1, 1)),
                                          dimension_numbers=_LAYOUT)

  # As a matmul on a CPU, whose gradient is one too: see `_gradient_in_kernel` in
  # `cpu/convolution.py` for what XLA's convolution costs there.
  def of_kernel(kernel: jax.Array) -> jax.Array:
    if jax.default_backend() == "cpu":
      return _as_products(x, _subpixel_kernels(kernel))
    return _as_convolution(x, prepare(kernel).joined)

  return grad_x, jax.vjp(of_kernel, kernel)[1](grad)[0], None


upsample_and_convolve.defvjp(_forward, _backward)
