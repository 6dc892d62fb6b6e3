"""The layers that the UNet, the VAE and CLIP are made of. Channels last throughout.

Module attributes carry the names of diffusers' checkpoints, so that a weight's path in
the file is its path in the module (see `weights.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ddpo_jax.ops import attention, convolution, normalization, upsampling
from ddpo_jax.ops.activations import ACTIVATIONS
from ddpo_jax.ops.matmul import matmul, matmul_lora

# What is attended to, such as the prompts' embeddings; or, with `hoisting.hoist_weights`, what
# all key and value projections make of it.
Context = Float[Array, "branches*B S D"] | Sequence[Array]


def _add_bias(layer: nnx.Conv | nnx.Linear, y: jax.Array) -> jax.Array:
  return y if layer.bias is None else y + layer.bias[...].astype(y.dtype)


def tile(x: jax.Array, times: int) -> jax.Array:
  """Repeats the whole batch: what branches of guidance share, once for each of them."""
  return x if times == 1 else jnp.concatenate([x] * times)


class Conv(nnx.Conv):
  """A convolution with a square kernel and torch's symmetric padding."""

  def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, *,
               stride: int = 1, padding: int | None = None, dtype: DTypeLike,
               rngs: nnx.Rngs):
    padding = kernel_size // 2 if padding is None else padding
    super().__init__(in_channels, out_channels, (kernel_size, kernel_size),
                     strides=stride, padding=((padding, padding),) * 2, dtype=dtype,
                     param_dtype=dtype, rngs=rngs)
    self._stride = stride
    self._is_padded_3x3 = (kernel_size, padding) == (3, 1)
    self._prepared: nnx.Variable | None = nnx.data(None)

  def prepare(self) -> None:
    """Computes what depends on the kernel alone: for programs that use it many times."""
    if self._is_padded_3x3 and self._stride == 1:
      self._prepared = nnx.Variable(convolution.prepare(self.kernel[...]))

  def _prepared_value(self) -> Any:
    return None if self._prepared is None else self._prepared.get_value()

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    if not self._is_padded_3x3:
      return super().__call__(inputs, out_sharding)
    y = convolution.convolve(inputs.astype(self.dtype), self.kernel[...].astype(self.dtype),
                             self._prepared_value(), stride=self._stride)
    return _add_bias(self, y)


class UpsampleConv(Conv):
  """A 3×3 convolution of its input at twice the height and width, by nearest neighbours."""

  def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    super().__init__(channels, channels, dtype=dtype, rngs=rngs)

  def prepare(self) -> None:
    self._prepared = nnx.Variable(upsampling.prepare(self.kernel[...]))

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    y = upsampling.upsample_and_convolve(
        inputs.astype(self.dtype), self.kernel[...].astype(self.dtype),
        self._prepared_value())
    return _add_bias(self, y)

  def cropped(self, inputs: jax.Array, height: int, width: int) -> jax.Array:
    """The same, where only so much of the larger image is wanted, before it is convolved."""
    larger = inputs.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]
    y = convolution.convolve(larger.astype(self.dtype), self.kernel[...].astype(self.dtype))
    return _add_bias(self, y)


class Conv1x1(Conv):
  """A 1×1 convolution, computed as the matrix product that it is."""

  def __init__(self, in_channels: int, out_channels: int, *, dtype: DTypeLike,
               rngs: nnx.Rngs):
    super().__init__(in_channels, out_channels, 1, dtype=dtype, rngs=rngs)

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    rows = inputs.reshape(-1, inputs.shape[-1]).astype(self.dtype)
    y = matmul(rows, self.kernel[0, 0].astype(self.dtype))
    return _add_bias(self, y.reshape(*inputs.shape[:-1], -1))


class Linear(nnx.Linear):
  """A linear layer that LoRA can be attached to (`lora.py` does)."""

  def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True,
               dtype: DTypeLike, rngs: nnx.Rngs):
    super().__init__(in_features, out_features, use_bias=use_bias, dtype=dtype,
                     param_dtype=dtype, rngs=rngs)
    self.lora_down: nnx.LoRAParam | None = nnx.data(None)  # [in, rank]
    self.lora_up: nnx.LoRAParam | None = nnx.data(None)  # [rank, out]

  def __call__(self, inputs: jax.Array, out_sharding: Any = None, *,
               low: Float[Array, "B T rank"] | None = None) -> jax.Array:
    """`low` is inputs @ lora_down, where `Attention` has computed it for q, k and v at once."""
    inputs = inputs.astype(self.dtype)
    # As a matrix: of more axes XLA transposes both factors of the weights' gradient first.
    y = matmul(inputs.reshape(-1, inputs.shape[-1]), self.kernel[...].astype(self.dtype))
    if self.lora_down is not None:
      low = matmul_lora(inputs, self.lora_down[...].astype(self.dtype))
    if self.lora_up is not None:
      assert low is not None
      y += matmul_lora(low, self.lora_up[...].astype(self.dtype)).reshape(y.shape)
    y = _add_bias(self, y)
    return y.reshape(*inputs.shape[:-1], -1)


class GroupNorm(nnx.GroupNorm):
  """Group normalisation with statistics in float32."""

  def __init__(self, channels: int, num_groups: int, *, epsilon: float,
               dtype: DTypeLike, rngs: nnx.Rngs):
    super().__init__(channels, num_groups=num_groups, epsilon=epsilon, dtype=dtype,
                     param_dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None,
               act: Callable[[jax.Array], jax.Array] = normalization.identity) -> jax.Array:
    """[B, *pixels, C] -> the same shape; `act` is the activation that follows."""
    assert mask is None and self.scale is not None and self.bias is not None
    return normalization.normalize(self.num_groups, self.epsilon, act, self.dtype, x,
                                   self.scale[...], self.bias[...])


class LayerNorm(nnx.LayerNorm):
  """Layer normalisation with statistics in float32, and torch's epsilon."""

  def __init__(self, features: int, *, epsilon: float = 1e-5, dtype: DTypeLike,
               rngs: nnx.Rngs):
    super().__init__(features, epsilon=epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    assert mask is None and self.scale is not None and self.bias is not None
    return normalization.normalize(None, self.epsilon, normalization.identity, self.dtype, x,
                                   self.scale[...], self.bias[...])


class Attention(nnx.Module):
  """Self-attention, or cross-attention where `context_dim` is given."""

  def __init__(self, features: int, num_heads: int, *, context_dim: int | None = None,
               dtype: DTypeLike, rngs: nnx.Rngs):
    linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
    self.num_heads = num_heads
    self.takes_context = context_dim is not None
    context_dim = features if context_dim is None else context_dim
    self.to_q = linear(features, features, use_bias=False)
    self.to_k = linear(context_dim, features, use_bias=False)
    self.to_v = linear(context_dim, features, use_bias=False)
    self.to_out = nnx.List([linear(features, features)])
    # Of self-attention's first three together, see `hoisting.py`.
    self.lora_down: nnx.LoRAParam | None = nnx.data(None)

  def __call__(self, x: Float[Array, "n*B T F"], context: Context | None = None,
               branches: int = 1) -> Float[Array, "branches*n*B T F"]:
    if self.lora_down is not None:
      dtype = self.to_q.dtype
      low = matmul_lora(x.astype(dtype), self.lora_down[...].astype(dtype))
      query, key, value = (layer(x, low=low) for layer in (self.to_q, self.to_k, self.to_v))
    else:
      attended: Any = x if context is None else context
      query, key, value = tile(self.to_q(x), branches), self.to_k(attended), self.to_v(attended)
    return self.to_out[0](attention.multi_head_attention(query, key, value, self.num_heads))


class ResnetBlock(nnx.Module):
  """Two convolutions around a residual; the time embedding is added between them."""

  def __init__(self, in_channels: int, out_channels: int, *, time_dim: int | None,
               num_groups: int, epsilon: float, act_fn: str, dtype: DTypeLike,
               rngs: nnx.Rngs):
    common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
    self.act = ACTIVATIONS[act_fn]
    self.norm1 = GroupNorm(in_channels, num_groups, epsilon=epsilon, **common)
    self.conv1 = Conv(in_channels, out_channels, **common)
    self.time_emb_proj = (None if time_dim is None else
                          Linear(time_dim, out_channels, **common))
    self.norm2 = GroupNorm(out_channels, num_groups, epsilon=epsilon, **common)
    self.conv2 = Conv(out_channels, out_channels, **common)
    self.conv_shortcut = (None if in_channels == out_channels else
                          Conv1x1(in_channels, out_channels, **common))

  def __call__(self, x: jax.Array, time_embedding: jax.Array | None = None) -> jax.Array:
    h = self.conv1(self.norm1(x, act=self.act))
    if self.time_emb_proj is not None and time_embedding is not None:
      h += self.time_emb_proj(self.act(time_embedding))[:, None, None]
    h = self.conv2(self.norm2(h, act=self.act))
    return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
  """Halves height and width; the VAE pads only below and to the right."""

  def __init__(self, channels: int, *, asymmetric: bool = False, dtype: DTypeLike,
               rngs: nnx.Rngs):
    self.asymmetric = asymmetric
    self.conv = Conv(channels, channels, stride=2, padding=0 if asymmetric else 1,
                     dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    if self.asymmetric:
      x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles height and width by nearest neighbours; `size` crops where a skip was odd."""

  def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.conv = UpsampleConv(channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    _, height, width, _ = x.shape
    if size is None or size == (2 * height, 2 * width):
      return self.conv(x)
    return self.conv.cropped(x, *size)


def timestep_embedding(timesteps: Int[Array, " B"], dim: int, *, flip_sin_to_cos: bool,
                       freq_shift: float) -> Float[Array, "B dim"]:
  """Sinusoidal embedding of timesteps."""
  half = dim // 2
  exponent = -jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32)
  angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent / (half - freq_shift))
  parts = [jnp.sin(angles), jnp.cos(angles)]
  embedding = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
  return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class TimestepEmbedding(nnx.Module):
  """The two-layer network behind the sinusoidal embedding."""

  def __init__(self, in_features: int, features: int, *, act_fn: str, dtype: DTypeLike,
               rngs: nnx.Rngs):
    self.act = ACTIVATIONS[act_fn]
    self.linear_1 = Linear(in_features, features, dtype=dtype, rngs=rngs)
    self.linear_2 = Linear(features, features, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.linear_2(self.act(self.linear_1(x)))


def set_compute_dtype(module: nnx.Module, dtype: DTypeLike) -> None:
  """Makes every layer of `module` compute in `dtype`, whatever its weights are kept in."""
  for _, layer in nnx.iter_graph(module):
    if isinstance(layer, (nnx.Conv, nnx.Linear, nnx.GroupNorm, nnx.LayerNorm)):
      layer.dtype = dtype
