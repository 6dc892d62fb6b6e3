"""Matrix products of a layer's input with its weights."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from ddpo_jax.ops.cpu import matmul as cpu


def matmul(x: Float[Array, "rows I"], kernel: Float[Array, "I O"]) -> Float[Array, "rows O"]:
  """x @ kernel."""
  return cpu.matmul(x, kernel) if jax.default_backend() == "cpu" else x @ kernel
