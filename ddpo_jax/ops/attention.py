"""Scaled dot-product attention, by whatever serves it best on the device there is."""

from __future__ import annotations

from collections.abc import Callable
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.ops.chunked_attention import attend_in_chunks
from ddpo_jax.ops.cpu import attention as cpu

# XLA's attention holds so many scores at once, of all samples and heads: 32 MiB in float32.
MAX_SCORES = 2**23

_logger = logging.getLogger(__name__)

_xla_attention = functools.partial(jax.nn.dot_product_attention, implementation="xla")
_flash_attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def implementation(query: Float[Array, "B T N H"], key: Float[Array, "B S N H"]) -> str:
  """Which implementation of `jax.nn.dot_product_attention` serves these queries and keys.

  cuDNN's flash attention needs a GPU and half precision; its backward refuses odd numbers of
  queries and, before Hopper, head sizes over 128. Those cases are small, and XLA's own
  attention serves them.
  """
  half = query.dtype in (jnp.float16, jnp.bfloat16)
  if jax.default_backend() != "gpu" or not half:
    return "xla"
  _, length, _, head_dim = query.shape
  device = jax.local_devices()[0]
  if length % 2 or head_dim % 8 or head_dim > _largest_head(device):
    return "xla"
  one = lambda x: jax.ShapeDtypeStruct((1, x.shape[1], 1, head_dim), query.dtype)
  return "cudnn" if _cudnn_serves(device, one(query), one(key)) else "xla"


def _largest_head(device: jax.Device) -> int:
  """How many features a head may have in cuDNN's flash attention: more from Hopper on."""
  generation = str(getattr(device, "compute_capability", "")).partition(".")[0]
  return 256 if generation.isdigit() and int(generation) >= 9 else 128


@functools.cache
def _cudnn_serves(device: jax.Device, query: jax.ShapeDtypeStruct, key: jax.ShapeDtypeStruct
                  ) -> bool:
  """Whether this GPU has cuDNN's flash attention, forward and backward, for these shapes.

  The library is asked, as that depends on its version and on the GPU: it has none before
  Ampere, and on others than NVIDIA's there is no such library. A program that is compiled
  for a GPU which is not here is compiled for one that has it.
  """
  if device.platform != "gpu":
    return True

  def there_and_back(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
    out, backward = jax.vjp(functools.partial(attend_with_padded_keys, _flash_attention),
                            query, key, value)
    return backward(out)

  try:
    jax.jit(there_and_back).lower(query, key, key).compile()
  except (RuntimeError, ValueError) as error:
    _warn_once(str(error).strip().partition("\n")[0][:200])
    return False
  return True


@functools.cache
def _warn_once(reason: str) -> None:
  _logger.warning("cuDNN's flash attention cannot be used here (%s): XLA's takes its place, "
                  "which is slower and needs more memory", reason)


def multi_head_attention(query: Float[Array, "n*B T N*H"], key: Float[Array, "B S N*H"],
                         value: Float[Array, "B S N*H"], num_heads: int, *,
                         is_causal: bool = False) -> Float[Array, "n*B T N*H"]:
  """Scaled dot-product attention of N heads with H features each.

  No buffer grows with T·S: flash attention has none, and elsewhere so many queries are
  processed at a time that their scores fit `MAX_SCORES`. Keys and values may be fewer than
  queries: of several queries in a row.
  """
  dtype, shape = query.dtype, query.shape
  on_cpu = jax.default_backend() == "cpu"
  query = query.reshape(key.shape[0], -1, shape[-1])
  split = lambda x: x.reshape(*x.shape[:2], num_heads, -1)
  query, key, value = split(query), split(key), split(value)
  if is_causal:
    # In half precision `jax.nn` asks for a product that XLA does not have for CPUs.
    widen = lambda x: x.astype(jnp.float32) if on_cpu else x
    out = _xla_attention(widen(query), widen(key), widen(value), is_causal=True)
  elif on_cpu:
    out = cpu.attend(query, key, value)
  elif implementation(query, key) == "cudnn":
    out = attend_with_padded_keys(_flash_attention, query, key, value)
  else:
    out = _attend_by_xla(query, key, value)
  return out.reshape(shape).astype(dtype)


def _attend_by_xla(query: Float[Array, "B T N H"], key: Float[Array, "B S N H"],
                   value: Float[Array, "B S N H"]) -> Float[Array, "B T N H"]:
  batch, length, heads, _ = query.shape
  max_scores = MAX_SCORES // (batch * heads)  # of each sample and head
  if length * key.shape[1] <= max_scores:
    return _xla_attention(query, key, value)
  return attend_in_chunks(_xla_attention, query, key, value, max_scores)


def attend_with_padded_keys(attend: Callable[..., jax.Array], query: Float[Array, "B T N H"],
                            key: Float[Array, "B S N H"], value: Float[Array, "B S N H"]
                            ) -> Float[Array, "B T N H"]:
  """Attention to an odd number of keys (the 77 tokens of a prompt) by a kernel that refuses it.

  Keys and values are padded to a multiple of 8, and the padding is masked.
  """
  batch, length = key.shape[:2]
  if length % 2 == 0:
    return attend(query, key, value)
  padding = ((0, 0), (0, -length % 8), (0, 0), (0, 0))
  return attend(query, jnp.pad(key, padding), jnp.pad(value, padding),
                key_value_seq_lengths=jnp.full(batch, length, jnp.int32))
