"""3×3 convolutions, padded by 1."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from ddpo_jax.ops.cpu import convolution as cpu


def prepare(kernel: Float[Array, "3 3 I O"]) -> cpu.Prepared:
  """Computes what depends on the kernel alone, on a CPU: once, for many convolutions."""
  return cpu.prepare(kernel)


def convolve(x: Float[Array, "B h w I"], kernel: Float[Array, "3 3 I O"],
             prepared: cpu.Prepared | None = None, *, stride: int = 1
             ) -> Float[Array, "B h/stride w/stride O"]:
  """The convolution of x.

  Args:
    x: the input.
    kernel: the kernel, of x's dtype.
    prepared: `prepare(kernel)`, where that has been computed outside of a loop; no gradient
      flows into it.
    stride: 1, or 2 for every second pixel.
  """
  if jax.default_backend() == "cpu":
    return (cpu.convolve(x, kernel, prepared) if stride == 1 else
            cpu.convolve_strided(x, kernel))
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)),
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))
