"""Activation functions by the names that config.json files have for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x Φ(x) and its derivative, in float32; of erf, which takes half of erfc's time."""
  x = x.astype(jnp.float32)
  cumulative = 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)
  density = jnp.exp(-0.5 * x * x) * (2 * math.pi)**-0.5
  return x * cumulative, cumulative + x * density


@jax.custom_jvp
def _exact_gelu(x: jax.Array) -> jax.Array:
  """x Φ(x), Φ the normal distribution's: GELU (arXiv:1606.08415), not approximated.

  With a derivative of its own: JAX 0.12.0 cannot take erf's inside of `jax.shard_map`.
  """
  return _gelu_and_slope(x)[0].astype(x.dtype)


@_exact_gelu.defjvp
def _exact_gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]
                    ) -> tuple[jax.Array, jax.Array]:
  (x,), (tangent,) = primals, tangents
  y, slope = (array.astype(x.dtype) for array in _gelu_and_slope(x))
  return y, slope * tangent


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "gelu": _exact_gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@jax.custom_vjp
def geglu(x: Float[Array, "... two_features"]) -> Float[Array, "... features"]:
  """The first half of the features times the GELU of the second (arXiv:2002.05202).

  Its backward pass keeps x alone. What JAX derives keeps three arrays of half its size,
  written and read one by one.
  """
  return _geglu_forward(x)[0]


def _geglu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  value, gate = jnp.split(x, 2, axis=-1)
  return value * _exact_gelu(gate), x


def _geglu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
  value, gate = jnp.split(x, 2, axis=-1)
  gelu, slope = _gelu_and_slope(gate)  # both in float32
  return (jnp.concatenate([grad * gelu, grad * value.astype(jnp.float32) * slope],
                          axis=-1).astype(x.dtype),)


geglu.defvjp(_geglu_forward, _geglu_backward)
