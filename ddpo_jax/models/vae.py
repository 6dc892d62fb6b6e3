"""The KL autoencoder (arXiv:2112.10752) between images and latents."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from ddpo_jax import model_config
from ddpo_jax.errors import UserError
from ddpo_jax.models import layers
from ddpo_jax.ops import attention

_EPSILON = 1e-6

_SUPPORTED = {
    "mid_block_add_attention": (True,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    # Said of the reference's fp16 mode; the decoder here runs in the dtype asked for.
    "force_upcast": (True, False, None),
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """The fields of a vae/config.json that shape the network."""

  in_channels: int = 3
  out_channels: int = 3
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  latent_channels: int = 4
  norm_num_groups: int = 32
  act_fn: str = "silu"
  scaling_factor: float = 0.18215
  sample_size: int = 32  # informative only: the network takes any size

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> VAEConfig:
    """Reads a config.json; a missing field has diffusers' default.

    Raises:
      UserError: names the field that asks for something not built here.
    """
    block_types = {"down_block_types": "DownEncoderBlock2D",
                   "up_block_types": "UpDecoderBlock2D"}
    model_config.check_supported("VAE", cls, values, _SUPPORTED, also_read=block_types)
    for field, supported in block_types.items():
      for block_type in values.get(field, ()):
        if block_type != supported:
          raise UserError(f"VAE config: {field} has {block_type!r}, which is not "
                          f"supported; must be {supported!r}")
    config = model_config.read_fields(cls, values)
    model_config.check_activation("VAE", "act_fn", config.act_fn)
    if not config.scaling_factor > 0:
      raise UserError(f"VAE config: scaling_factor={config.scaling_factor} must be above 0")
    return config


class _Attention(nnx.Module):
  """Single-head self-attention over all pixels, with its own norm and residual."""

  def __init__(self, channels: int, num_groups: int, *, dtype: DTypeLike,
               rngs: nnx.Rngs):
    linear = lambda: layers.Linear(channels, channels, dtype=dtype, rngs=rngs)
    self.group_norm = layers.GroupNorm(channels, num_groups, epsilon=_EPSILON,
                                       dtype=dtype, rngs=rngs)
    self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
    self.to_out = nnx.List([linear()])

  def __call__(self, x: jax.Array) -> jax.Array:
    h = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
    h = attention.multi_head_attention(self.to_q(h), self.to_k(h), self.to_v(h), 1)
    return x + self.to_out[0](h).reshape(x.shape)


def _resnet(config: VAEConfig, in_channels: int, out_channels: int, *, dtype: DTypeLike,
            rngs: nnx.Rngs) -> layers.ResnetBlock:
  return layers.ResnetBlock(in_channels, out_channels, time_dim=None,
                            num_groups=config.norm_num_groups, epsilon=_EPSILON,
                            act_fn=config.act_fn, dtype=dtype, rngs=rngs)


class _MidBlock(nnx.Module):

  def __init__(self, config: VAEConfig, channels: int, *, dtype: DTypeLike,
               rngs: nnx.Rngs):
    self.attentions = nnx.List([_Attention(channels, config.norm_num_groups, dtype=dtype,
                                           rngs=rngs)])
    self.resnets = nnx.List([_resnet(config, channels, channels, dtype=dtype, rngs=rngs)
                             for _ in range(2)])

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _DownBlock(nnx.Module):

  def __init__(self, config: VAEConfig, in_channels: int, out_channels: int, *,
               downsample: bool, dtype: DTypeLike, rngs: nnx.Rngs):
    self.resnets = nnx.List([
        _resnet(config, in_channels if i == 0 else out_channels, out_channels,
                dtype=dtype, rngs=rngs) for i in range(config.layers_per_block)])
    self.downsamplers = nnx.List([
        layers.Downsample(out_channels, asymmetric=True, dtype=dtype, rngs=rngs)
    ] if downsample else [])

  def __call__(self, x: jax.Array) -> jax.Array:
    for module in (*self.resnets, *self.downsamplers):
      x = module(x)
    return x


class _UpBlock(nnx.Module):

  def __init__(self, config: VAEConfig, in_channels: int, out_channels: int, *,
               upsample: bool, dtype: DTypeLike, rngs: nnx.Rngs):
    self.resnets = nnx.List([
        _resnet(config, in_channels if i == 0 else out_channels, out_channels,
                dtype=dtype, rngs=rngs) for i in range(config.layers_per_block + 1)])
    self.upsamplers = nnx.List([
        layers.Upsample(out_channels, dtype=dtype, rngs=rngs)] if upsample else [])

  def __call__(self, x: jax.Array) -> jax.Array:
    for module in (*self.resnets, *self.upsamplers):
      x = module(x)
    return x


class _Encoder(nnx.Module):

  def __init__(self, config: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
    channels = config.block_out_channels
    self.conv_in = layers.Conv(config.in_channels, channels[0], **common)
    self.down_blocks = nnx.List([
        _DownBlock(config, channels[max(i - 1, 0)], channels[i],
                   downsample=i < len(channels) - 1, **common)
        for i in range(len(channels))])
    self.mid_block = _MidBlock(config, channels[-1], **common)
    self.conv_norm_out = layers.GroupNorm(channels[-1], config.norm_num_groups,
                                          epsilon=_EPSILON, **common)
    self.conv_out = layers.Conv(channels[-1], 2 * config.latent_channels, **common)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.conv_in(x)
    for block in self.down_blocks:
      x = block(x)
    return self.conv_out(self.conv_norm_out(self.mid_block(x), act=jax.nn.silu))


class _Decoder(nnx.Module):

  def __init__(self, config: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
    channels = config.block_out_channels[::-1]
    self.conv_in = layers.Conv(config.latent_channels, channels[0], **common)
    self.mid_block = _MidBlock(config, channels[0], **common)
    self.up_blocks = nnx.List([
        _UpBlock(config, channels[max(i - 1, 0)], channels[i],
                 upsample=i < len(channels) - 1, **common)
        for i in range(len(channels))])
    self.conv_norm_out = layers.GroupNorm(channels[-1], config.norm_num_groups,
                                          epsilon=_EPSILON, **common)
    self.conv_out = layers.Conv(channels[-1], config.out_channels, **common)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.mid_block(self.conv_in(x))
    for block in self.up_blocks:
      x = block(x)
    return self.conv_out(self.conv_norm_out(x, act=jax.nn.silu))


class AutoencoderKL(nnx.Module):
  """Encoder and decoder of Stable Diffusion's latents."""

  def __init__(self, config: VAEConfig, *, dtype: DTypeLike = jnp.float32,
               rngs: nnx.Rngs):
    latent = config.latent_channels
    self.config = config
    self.encoder = _Encoder(config, dtype=dtype, rngs=rngs)
    self.decoder = _Decoder(config, dtype=dtype, rngs=rngs)
    self.quant_conv = layers.Conv1x1(2 * latent, 2 * latent, dtype=dtype, rngs=rngs)
    self.post_quant_conv = layers.Conv1x1(latent, latent, dtype=dtype, rngs=rngs)

  def encode(self, images: Float[Array, "B H W 3"]
             ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
    """The posterior of an image's latents.

    Args:
      images: in [-1, 1].

    Returns:
      Mean and log variance, before multiplication by
      `config.scaling_factor`; log variance is kept in [-30, 20].
    """
    mean, log_variance = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)

  def drop_encoder(self) -> None:
    """Leaves what `decode` needs, which is all that sampling does."""
    del self.encoder, self.quant_conv

  def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
    """Latents, already divided by `scaling_factor`, to images in [-1, 1]."""
    return self.decoder(self.post_quant_conv(latents))


def to_uint8(images: Float[Array, "*B H W C"]) -> UInt8[Array, "*B H W C"]:
  """[-1, 1] floats to 0..255, rounded half to even as torch does."""
  unit = jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)
  return jnp.round(unit * 255).astype(jnp.uint8)
