"""3×3 convolutions as few, large matmuls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.ops.cpu import winograd
from ddpo_jax.ops.cpu.matmul import dot, einsum_f32, matmul, transpose
from ddpo_jax.parts import largest_divisor

# All of these were measured. "Pixels" are height times width of one image; a bound on "channels"
# is one on those of the input and on those of the output.

# With fewer channels Winograd's transforms cost more than they save.
_WINOGRAD_MIN_CHANNELS = 32
# With more pixels Winograd's transforms cost more than they save.
_WINOGRAD_MAX_PIXELS = 16
# Where the kernel is transformed already, Winograd also serves up to channels // this many pixels.
_WINOGRAD_CHANNELS_PER_PIXEL = 4

# Up to this many pixels XLA's convolution is ten times slower than one matmul (im2col).
_IM2COL_MAX_PIXELS = 4
# Up to this many output channels XLA's convolution is twice as slow as `_shift_and_add`.
_SHIFT_MAX_OUTPUTS = 3

# From this many channels on matmuls are quicker than XLA's convolution in half precision.
_HALF_MIN_CHANNELS = 256
# Up to this many pixels that is one matmul for all of them (half precision).
_HALF_MAX_PIXELS_AT_ONCE = 256
# Up to this many pixels it is matmuls for some rows at a time (half precision).
_HALF_MAX_PIXELS_IN_PARTS = 128 * 128
# Rows taken at a time have at most this many pixels, so that the caches hold the neighbourhoods.
_MAX_PIXELS_OF_PART = 1024

# Up to this many channels XLA's convolution first writes out each pixel's neighbourhood, of which
# `_two_at_once` needs half as many.
_TWO_AT_ONCE_MAX_CHANNELS = 16


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
  most = _WINOGRAD_MAX_PIXELS
  if prepared is not None:
    most = max(most, channels // _WINOGRAD_CHANNELS_PER_PIXEL)
  fits = height % 2 == width % 2 == 0 and height * width <= most
  return fits and x.dtype == jnp.float32 and channels >= _WINOGRAD_MIN_CHANNELS


def _transformed(kernel: jax.Array, prepared: Prepared | None) -> winograd.Transformed:
  return winograd.transform(kernel) if prepared is None else prepared.transformed


def favors_im2col(x: jax.Array, kernel: jax.Array) -> bool:
  """Whether XLA's convolution, which widens half precision, is slower than a matmul."""
  return _favors_matmuls(x, kernel, _HALF_MAX_PIXELS_AT_ONCE)


def _favors_matmuls(x: jax.Array, kernel: jax.Array, most_pixels: int) -> bool:
  return (x.dtype != jnp.float32 and x.shape[1] * x.shape[2] <= most_pixels
          and min(kernel.shape[2:]) >= _HALF_MIN_CHANNELS)


def _convolve_otherwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
  if x.shape[1] * x.shape[2] <= _IM2COL_MAX_PIXELS or favors_im2col(x, kernel):
    return _im2col(x, kernel)
  if _favors_matmuls(x, kernel, _HALF_MAX_PIXELS_IN_PARTS):
    return _im2col_in_parts(x, kernel)
  if kernel.shape[3] <= _SHIFT_MAX_OUTPUTS:
    return _shift_and_add(x, kernel)
  if max(kernel.shape[2:]) <= _TWO_AT_ONCE_MAX_CHANNELS and x.shape[2] % 2 == 0:
    return _two_at_once(x, kernel)
  return _convolve_directly(x, kernel)


def convolve_strided(x: Float[Array, "B h w I"], kernel: Float[Array, "3 3 I O"]
                     ) -> Float[Array, "B h/2 w/2 O"]:
  """A 3×3 convolution of every second pixel, padded by 1.

  XLA's own takes as long, but the gradients that JAX derives of it are convolutions with holes,
  which take three times as long, and in newer versions thirty times.
  """
  return _im2col(x, kernel, stride=2)


def _turn(kernel: jax.Array) -> jax.Array:
  return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _im2col(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """The same as one matmul, of each pixel's neighbourhood with the kernel."""
  around = _neighbourhoods(x, stride)
  rows = around.reshape(-1, around.shape[-1])
  return matmul(rows, kernel.reshape(-1, kernel.shape[-1])).reshape(*around.shape[:3], -1)


def _neighbourhoods(x: Float[Array, "B h w C"], stride: int = 1
                    ) -> Float[Array, "B h/stride w/stride 9*C"]:
  """The 3×3 pixels around each, row by row, or around each pixel of every `stride`."""
  height, width = x.shape[1:3]
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return jnp.concatenate([padded[:, i:i + height:stride, j:j + width:stride]
                          for i in range(3) for j in range(3)], axis=-1)


def _im2col_in_parts(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same for some rows of an image after the other, by a matmul for each row of windows."""
  batch, height, width, channels = x.shape
  rows = largest_divisor(height, max(1, _MAX_PIXELS_OF_PART // width))
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  window_kernels = kernel.reshape(3, 3 * channels, -1)

  def convolve_part(part: jax.Array) -> jax.Array:
    image, first = part // (height // rows), part % (height // rows) * rows
    taken = jax.lax.dynamic_index_in_dim(padded, image, keepdims=False)
    taken = jax.lax.dynamic_slice_in_dim(taken, first, rows + 2)
    beside = jnp.concatenate([taken[:, j:j + width] for j in range(3)], axis=-1)
    beside = jax.lax.optimization_barrier(beside)
    y = sum((einsum_f32("rwi,io->rwo", beside[i:i + rows], window_kernels[i]) for i in range(3)),
            jnp.float32(0))
    return y.astype(x.dtype)

  parts = jax.lax.map(convolve_part, jnp.arange(batch * height // rows))
  return parts.reshape(batch, height, width, -1)


def _gradient_of_im2col(grad: jax.Array, kernel: jax.Array) -> jax.Array:
  """Of `_im2col` in x: a matmul with the kernel as it lies, whose parts are shifted and added."""
  matrix = kernel.reshape(-1, kernel.shape[3])
  products = einsum_f32("ro,co->rc", grad.reshape(-1, grad.shape[-1]), matrix)
  products = products.reshape(*grad.shape[:3], 9, -1)
  return _sum_of_shifted(products, range(9)[::-1]).astype(grad.dtype)


def _shift_and_add(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same as one matmul of the pixels with all nine matrices, shifted and added up."""
  channels = x.shape[3]
  matrix = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
  products = jax.lax.optimization_barrier(x.reshape(-1, channels) @ matrix)
  return _sum_of_shifted(products.reshape(*x.shape[:3], 9, -1), range(9))


def _sum_of_shifted(products: Float[Array, "B h w 9 C"], order: Sequence[int]
                    ) -> Float[Array, "B h w C"]:
  """Sums over each pixel's 3×3 neighbourhood, taking product `order[k]` of its k-th neighbour."""
  height, width = products.shape[1:3]
  parts = jnp.pad(products, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
  return jnp.sum(jnp.stack([
      parts[:, place // 3:place // 3 + height, place % 3:place % 3 + width, which]
      for place, which in enumerate(order)]), axis=0)


def _two_at_once(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same with windows of 3×4, each of which gives two pixels of a row."""
  nowhere = jnp.zeros_like(kernel[:, :1])
  both = jnp.concatenate([jnp.concatenate([kernel, nowhere], axis=1),
                          jnp.concatenate([nowhere, kernel], axis=1)], axis=3)
  y = _convolve_directly(x, both, strides=(1, 2))
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
  elif favors_im2col(grad, kernel):
    grad_x = _gradient_of_im2col(grad, kernel)
  else:
    grad_x = _convolve_otherwise(grad, _turn(kernel) if prepared is None else prepared.turned)
  return grad_x, _gradient_in_kernel(x, grad), None


def _gradient_in_kernel(x: Float[Array, "B h w I"], grad: Float[Array, "B h w O"]
                        ) -> Float[Array, "3 3 I O"]:
  """One matmul of x with the neighbourhoods of `grad`; XLA's convolution takes 50 times as long."""
  around = _neighbourhoods(grad)
  products = dot(transpose(x.reshape(-1, x.shape[3])), around.reshape(-1, around.shape[3]))
  products = products.reshape(x.shape[3], 3, 3, -1)
  return jnp.flip(products, (1, 2)).transpose(1, 2, 0, 3)  # a pixel sees what is opposite to it


convolve.defvjp(_convolve_forward, _convolve_backward)
