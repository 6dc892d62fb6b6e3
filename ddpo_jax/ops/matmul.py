"""Matrix products of a layer's input with its weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.ops.cpu import matmul as cpu


def matmul(x: Float[Array, "rows I"], kernel: Float[Array, "I O"]) -> Float[Array, "rows O"]:
  """x @ kernel."""
  return cpu.matmul(x, kernel) if jax.default_backend() == "cpu" else x @ kernel


def matmul_lora(x: Float[Array, "branches*B T I"],
                weight: Float[Array, "I O"] | Float[Array, "B I O"]
                ) -> Float[Array, "branches*B T O"]:
  """x @ weight, where `weight` is one of LoRA's matrices.

  Of a weight that is there B times (`hoisting.copy_lora`) the gradient is each sample's by itself.
  """
  rows = x.reshape(-1, x.shape[-1])
  if weight.ndim == 2:
    return matmul(rows, weight).reshape(*x.shape[:-1], -1)
  return _matmul_copies(len(weight), x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_copies(copies: int, x: jax.Array, weights: jax.Array) -> jax.Array:
  """x @ weights[0]; the others are copies of it, one for each sample."""
  del copies
  return matmul_lora(x, weights[0])


def _matmul_copies_forward(copies: int, x: jax.Array, weights: jax.Array):
  return _matmul_copies(copies, x, weights), (x, weights[0])


def _matmul_copies_backward(copies: int, residuals: tuple[jax.Array, jax.Array], grad: jax.Array):
  x, weight = residuals
  if copies * weight.size > x.size + grad.size:
    of_branches = lambda y: y.reshape(-1, copies, *y.shape[1:])
    by_sample = jnp.einsum("nbti,nbto->bio", of_branches(x), of_branches(grad))
  else:  # for each row of the batch: to contract two axes would begin with transposing them
    by_row = jnp.einsum("bti,bto->bio", x, grad, preferred_element_type=jnp.float32)
    # Added up by additions, which XLA fuses with what follows, and not by a reduction.
    branches = jnp.split(by_row, len(x) // copies)
    by_sample = functools.reduce(jnp.add, branches).astype(weight.dtype)
  return matmul_lora(grad, weight.T), by_sample


_matmul_copies.defvjp(_matmul_copies_forward, _matmul_copies_backward)
