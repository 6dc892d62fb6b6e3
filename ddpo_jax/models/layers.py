"""The layers that the UNet, the VAE and CLIP are made of. Channels last throughout.

Module attributes carry the names of diffusers' checkpoints, so that a weight's path in
the file is its path in the module (see `pretrained.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any

from flax import nnx
import jax
from jax.experimental.layout import Format, Layout
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ddpo_jax.models import attention, doubling, norms, processor
from ddpo_jax.types import UserError

# The axes of an [H, W, I, O] kernel from the slowest in memory to the fastest.
_OUTPUT_FIRST = (3, 0, 1, 2)


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
def gated_gelu(x: Float[Array, "... two_features"]) -> Float[Array, "... features"]:
  """The first half of the features times the GELU of the second (arXiv:2002.05202).

  Its backward pass keeps x alone. What JAX derives keeps three arrays of half its size,
  written and read one by one.
  """
  return _gated_gelu_forward(x)[0]


def _gated_gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  value, gate = jnp.split(x, 2, axis=-1)
  return value * _exact_gelu(gate), x


def _gated_gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
  value, gate = jnp.split(x, 2, axis=-1)
  gelu, slope = _gelu_and_slope(gate)  # both in float32
  return (jnp.concatenate([grad * gelu, grad * value.astype(jnp.float32) * slope],
                          axis=-1).astype(x.dtype),)


gated_gelu.defvjp(_gated_gelu_forward, _gated_gelu_backward)


def check_supported(kind: str, values: Mapping[str, Any], fields: set[str],
                    supported: Mapping[str, tuple[Any, ...]]) -> None:
  """Refuses a config.json that asks for something the networks here do not build.

  Args:
    kind: what the file describes, for the message.
    values: the file's content.
    fields: names that the network reads.
    supported: for the names it does not read, the values that mean what it builds.

  Raises:
    UserError: names the field and its value. A name that is in neither list passes
      only while it asks for nothing (null, false).
  """
  for name, value in values.items():
    if name in fields or name.startswith("_"):
      continue
    allowed = supported.get(name, (None, False))
    if value not in allowed:
      raise UserError(f"{kind} config: {name}={value!r} is not supported; "
                      f"must be one of {', '.join(map(repr, allowed))}")


def check_activation(kind: str, field: str, name: str) -> None:
  if name not in ACTIVATIONS:
    raise UserError(f"{kind} config: {field}={name!r} is not supported; "
                    f"must be one of {', '.join(ACTIVATIONS)}")


def _add_bias(layer: nnx.Conv | nnx.Linear, y: jax.Array) -> jax.Array:
  return y if layer.bias is None else y + layer.bias[...].astype(y.dtype)


def _multiply(rows: Float[Array, "rows I"], kernel: Float[Array, "I O"]
              ) -> Float[Array, "rows O"]:
  if jax.default_backend() == "cpu":
    return processor.multiply(rows, kernel)
  return rows @ kernel


class Conv(nnx.Conv):
  """A convolution with a square kernel and torch's symmetric padding."""

  def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, *,
               stride: int = 1, padding: int | None = None, dtype: DTypeLike,
               rngs: nnx.Rngs):
    padding = kernel_size // 2 if padding is None else padding
    super().__init__(in_channels, out_channels, (kernel_size, kernel_size),
                     strides=stride, padding=((padding, padding),) * 2, dtype=dtype,
                     param_dtype=dtype, rngs=rngs)
    self._centred = (kernel_size, stride, padding) == (3, 1, 1)
    self._prepared: nnx.Variable | None = nnx.data(None)  # see `prepare`

  def prepare(self) -> None:
    """Computes what depends on the kernel alone: for programs that use it many times."""
    if self._centred:
      kernel = self.kernel[...]
      self._prepared = nnx.Variable((processor.prepare(kernel),
                                     doubling.kernels_of_places(kernel)))

  def _what_was_prepared(self) -> tuple[Any, Any]:
    return (None, None) if self._prepared is None else self._prepared.get_value()

  def of_doubled(self, inputs: jax.Array) -> jax.Array:
    """What the call gives for inputs of twice the height and width, each pixel repeated."""
    _, of_places = self._what_was_prepared()
    y = doubling.convolve_doubled(inputs.astype(self.dtype),
                                  self.kernel[...].astype(self.dtype), of_places)
    return _add_bias(self, y)

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    if not self._centred or jax.default_backend() != "cpu":
      return super().__call__(inputs, out_sharding)
    prepared, _ = self._what_was_prepared()
    y = processor.convolve(inputs.astype(self.dtype), self.kernel[...].astype(self.dtype),
                           prepared)
    return _add_bias(self, y)


class Conv1x1(Conv):
  """A 1×1 convolution, computed as the matrix product that it is."""

  def __init__(self, in_channels: int, out_channels: int, *, dtype: DTypeLike,
               rngs: nnx.Rngs):
    super().__init__(in_channels, out_channels, 1, dtype=dtype, rngs=rngs)

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    rows = inputs.reshape(-1, inputs.shape[-1]).astype(self.dtype)
    y = _multiply(rows, self.kernel[0, 0].astype(self.dtype))
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
               low: Float[Array, "rows rank"] | None = None) -> jax.Array:
    """`low` is what up is multiplied with, where down's product is known already."""
    # As a matrix: of more axes XLA transposes both factors of the weights' gradient first.
    rows = inputs.reshape(-1, inputs.shape[-1])
    rows = rows.astype(self.dtype)
    y = _multiply(rows, self.kernel[...].astype(self.dtype))
    if self.lora_down is not None:
      low = _multiply(rows, self.lora_down[...].astype(self.dtype))
    if self.lora_up is not None:
      assert low is not None
      y += _multiply(low, self.lora_up[...].astype(self.dtype))
    y = _add_bias(self, y)
    return y.reshape(*inputs.shape[:-1], -1)


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
    # Of self-attention's first three together, see `folding.py`.
    self.lora_down: nnx.LoRAParam | None = nnx.data(None)

  def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
    if self.lora_down is not None:
      rows = x.reshape(-1, x.shape[-1]).astype(self.to_q.dtype)
      low = rows @ self.lora_down[...].astype(rows.dtype)
      query, key, value = (layer(x, low=low) for layer in (self.to_q, self.to_k, self.to_v))
    else:
      context = x if context is None else context
      query, key, value = self.to_q(x), self.to_k(context), self.to_v(context)
    return self.to_out[0](attention.multi_head_attention(query, key, value, self.num_heads))


class ResnetBlock(nnx.Module):
  """Two convolutions around a residual; the time embedding is added between them."""

  def __init__(self, in_channels: int, out_channels: int, *, time_dim: int | None,
               num_groups: int, epsilon: float, act_fn: str, dtype: DTypeLike,
               rngs: nnx.Rngs):
    common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
    self.act = ACTIVATIONS[act_fn]
    self.norm1 = norms.GroupNorm(in_channels, num_groups, epsilon=epsilon, **common)
    self.conv1 = Conv(in_channels, out_channels, **common)
    self.time_emb_proj = (None if time_dim is None else
                          Linear(time_dim, out_channels, **common))
    self.norm2 = norms.GroupNorm(out_channels, num_groups, epsilon=epsilon, **common)
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
  """Doubles height and width by repetition; `size` crops where a skip was odd."""

  def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.conv = Conv(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    _, height, width, _ = x.shape
    if size is None or size == (2 * height, 2 * width):
      return self.conv.of_doubled(x)
    return self.conv(x.repeat(2, axis=1).repeat(2, axis=2)[:, :size[0], :size[1]])


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


def place_weights(weights: Any, sharding: jax.sharding.Sharding, *,
                  output_first: bool | None = None) -> Any:
  """Puts weights on devices, convolution kernels in the order in which cuDNN reads them.

  A kernel keeps its shape [H, W, I, O]; in memory O comes first. A program compiled for
  arguments that lie so reads them where they are, and else holds a second copy of all of
  them: a gigabyte for Stable Diffusion's UNet in half precision.

  Args:
    weights: a pytree of arrays that programs only read.
    sharding: where to put them.
    output_first: whether to reorder; on GPUs if None.
  """
  def place(weight: jax.Array) -> jax.Array:
    # As it is first: the device puts it in order.
    return jax.device_put(jax.device_put(weight, sharding),
                          _format(weight, sharding, output_first))

  return jax.tree.map(place, weights)


def placed_shapes(weights: Any, sharding: jax.sharding.Sharding, *,
                  output_first: bool | None = None) -> Any:
  """What `place_weights` would make of them, for a program that is compiled before."""
  return jax.tree.map(
      lambda weight: jax.ShapeDtypeStruct(
          weight.shape, weight.dtype, sharding=_format(weight, sharding, output_first)),
      weights)


def _format(weight: Any, sharding: jax.sharding.Sharding, output_first: bool | None
            ) -> jax.sharding.Sharding | Format:
  if output_first is None:
    devices: Any = sharding.device_set
    output_first = all(device.platform == "gpu" for device in devices)
  is_convolution = weight.ndim == 4 and weight.shape[:2] != (1, 1)  # those are matrices
  if output_first and is_convolution:
    return Format(Layout(_OUTPUT_FIRST), sharding)
  return sharding
