"""3×3 convolutions of small images with 2.25 to 4 multiplications where the definition has 9.

Along either axis the outputs are output · ((kernel · 3 weights) ∘ (input · pixels)), with
matrices of small whole numbers and a half (arXiv:1509.09308). The transforms are written as
matmuls too, which CPUs are quick at: the gathering of tiles, padding included, and their laying
out are worked into the matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np


class _Axis(NamedTuple):
  """How an axis of some pixels is convolved."""

  input: Float[np.ndarray, "positions tiles pixels"]
  output: Float[np.ndarray, "pixels positions tiles"]


# F(2, 3): 2 outputs come from 4 inputs, by 4 multiplications.
_INPUT_OF_TILE = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
                          np.float32)
_KERNEL_OF_TILE = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.float32) / 2
_OUTPUT_OF_TILE = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)

# Two pixels with zeros around them take 3 multiplications: of weights (a, b, c) the outputs are
# b(x + y) + (c − b)y and b(x + y) + (a − b)x.
_KERNEL_OF_PAIR = np.array([[0, 1, 0], [0, -1, 1], [1, -1, 0]], np.float32)
_PAIR = _Axis(input=np.array([[[1, 1]], [[0, 1]], [[1, 0]]], np.float32),
              output=np.array([[[1], [1], [0]], [[1], [0], [1]]], np.float32))


def _tiles(pixels: int) -> _Axis:
  """An axis as tiles of 2 outputs each, padded by a zero at either end."""
  inputs = np.zeros((4, pixels // 2, pixels + 2), np.float32)
  outputs = np.zeros((pixels, 4, pixels // 2), np.float32)
  for tile in range(pixels // 2):
    inputs[:, tile, 2 * tile:2 * tile + 4] = _INPUT_OF_TILE
    outputs[2 * tile:2 * tile + 2, :, tile] = _OUTPUT_OF_TILE
  return _Axis(inputs[:, :, 1:-1], outputs)  # what the zeros are multiplied with is left out


class Transformed(NamedTuple):
  """A kernel, ready to be multiplied with transformed images."""

  of_pairs: Float[Array, "9 I O"]  # for images of 2×2 pixels
  of_tiles: Float[Array, "16 I O"]  # for all others


def transform(kernel: Float[Array, "3 3 I O"]) -> Transformed:
  def along_both(matrix: np.ndarray) -> jax.Array:
    weights = jnp.matmul(np.kron(matrix, matrix), kernel.reshape(9, -1))
    return weights.reshape(-1, *kernel.shape[2:])

  return Transformed(along_both(_KERNEL_OF_PAIR), along_both(_KERNEL_OF_TILE))


def convolve(x: Float[Array, "B h w I"], kernel: Transformed) -> Float[Array, "B h w O"]:
  """A 3×3 convolution, padded by 1, of an image with even height and width."""
  to_positions, from_positions, weights = _choose(x, kernel)
  return _apply(x, to_positions, from_positions,
                lambda tiles: jnp.einsum("pti,pio->pto", tiles, weights), weights.shape[0])


def gradient(grad: Float[Array, "B h w O"], kernel: Transformed) -> Float[Array, "B h w I"]:
  """The gradient in x of `convolve`: all three linear steps transposed, in reverse."""
  to_positions, from_positions, weights = _choose(grad, kernel)
  return _apply(grad, from_positions.T, to_positions.T,
                lambda tiles: jnp.einsum("pto,pio->pti", tiles, weights), weights.shape[0])


def _choose(image: jax.Array, kernel: Transformed
            ) -> tuple[np.ndarray, np.ndarray, jax.Array]:
  """[positions · tiles, pixels] and its counterpart, and the weights that belong to them."""
  height, width = image.shape[1:3]
  pairs = height == width == 2
  rows, columns = (_PAIR if pairs else _tiles(n) for n in (height, width))
  to_positions = np.einsum("apy,bqx->abpqyx", rows.input, columns.input)
  from_positions = np.einsum("yap,xbq->yxabpq", rows.output, columns.output)
  return (to_positions.reshape(-1, height * width),
          from_positions.reshape(height * width, -1),
          kernel.of_pairs if pairs else kernel.of_tiles)


def _apply(image: jax.Array, to_positions: np.ndarray, from_positions: np.ndarray,
           product: Callable[[jax.Array], jax.Array], positions: int) -> jax.Array:
  """For each position there is one matmul, over all tiles of all images."""
  # Each step is to be as it is written: what XLA fuses matmuls with slows them down. The
  # images' own matmuls, one for each, keep what comes before and after in its layout: XLA
  # would compute norms and activations transposed, one number at a time.
  apart = jax.lax.optimization_barrier
  batch, height, width, channels = image.shape
  each = lambda matrix: np.broadcast_to(matrix, (batch, *matrix.shape))
  tiles = apart(each(to_positions) @ image.reshape(batch, -1, channels))
  by_position = tiles.reshape(batch, positions, -1, channels).swapaxes(0, 1)
  products = apart(product(apart(by_position.reshape(positions, -1, channels))))
  by_image = products.reshape(positions, batch, -1, products.shape[-1]).swapaxes(0, 1)
  y = apart(each(from_positions) @ apart(by_image.reshape(batch, -1, products.shape[-1])))
  return y.reshape(batch, height, width, -1)
