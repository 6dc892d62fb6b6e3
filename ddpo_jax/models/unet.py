"""The conditional UNet of Stable Diffusion 1.x and 2.x: the policy that DDPO trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ddpo_jax import model_config
from ddpo_jax.errors import UserError
from ddpo_jax.models import layers
from ddpo_jax.ops.activations import ACTIVATIONS, geglu

GRADIENT_CHECKPOINTING = ("none", "blocks", "full")

# Fields of unet/config.json that this network does not read, with the values that
# describe what it builds anyway.
_SUPPORTED = {
    "attention_type": ("default",),
    "addition_embed_type_num_heads": (64,),  # unused without addition_embed_type
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dropout": (0, None),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "transformer_layers_per_block": (1,),
    # Softmax is in float32 here whatever the network computes in.
    "upcast_attention": (True, False, None),
}

# What diffusers' EMAModel adds to the config of the weights that it has averaged.
_AVERAGING = ("decay", "inv_gamma", "min_decay", "optimization_step", "power",
              "update_after_step", "use_ema_warmup")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """The fields of a unet/config.json that shape the network."""

  sample_size: int | tuple[int, ...] | None = None  # informative: it takes any size
  in_channels: int = 4
  out_channels: int = 4
  flip_sin_to_cos: bool = True
  freq_shift: float = 0
  down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
  mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
  up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: tuple[int, ...] | int = 2
  act_fn: str = "silu"
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  cross_attention_dim: int = 1280
  # In Stable Diffusion's files this is the NUMBER of heads, in spite of its name.
  attention_head_dim: tuple[int, ...] | int = 8
  use_linear_projection: bool = False

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
    """Reads a config.json; a missing field has diffusers' default.

    Raises:
      UserError: names the field that asks for something not built here.
    """
    model_config.check_supported("UNet", cls, values, _SUPPORTED, also_read=_AVERAGING)
    config = model_config.read_fields(cls, {**values, "sample_size": sample_size(values)})
    model_config.check_activation("UNet", "act_fn", config.act_fn)
    config._check()
    return config

  def _check(self) -> None:
    if self.in_channels != self.out_channels:
      raise UserError(f"UNet config: in_channels={self.in_channels} is not supported "
                      f"(an inpainting or image-conditioned UNet?); must equal "
                      f"out_channels={self.out_channels}")
    if not isinstance(self.norm_num_groups, int):
      raise UserError(f"UNet config: norm_num_groups={self.norm_num_groups!r} is not "
                      "supported; must be a number of groups")
    if not isinstance(self.cross_attention_dim, int):
      raise UserError(f"UNet config: cross_attention_dim={self.cross_attention_dim!r} is "
                      "not supported; must be one number for all blocks")
    levels = len(self.block_out_channels)
    allowed = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
               "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    for name, choices in allowed.items():
      for block_type in getattr(self, name):
        if block_type not in choices:
          raise UserError(f"UNet config: {name} has {block_type!r}, which is not "
                          f"supported; must be one of {', '.join(choices)}")
    if self.mid_block_type not in ("UNetMidBlock2DCrossAttn", None):
      raise UserError(f"UNet config: mid_block_type={self.mid_block_type!r} is not "
                      "supported; must be 'UNetMidBlock2DCrossAttn' or null")
    for name in ("down_block_types", "up_block_types", "layers_per_block",
                 "attention_head_dim"):
      value = getattr(self, name)
      if isinstance(value, tuple) and len(value) != levels:
        raise UserError(f"UNet config: {name} has {len(value)} entries; must have one "
                        f"for each of the {levels} block_out_channels")
    self._check_heads()

  def _check_heads(self) -> None:
    """That heads divide the channels of every level that attends."""
    levels = len(self.block_out_channels)
    types = zip(self.down_block_types, reversed(self.up_block_types))
    for level, (heads, channels, pair) in enumerate(
        zip(self.heads, self.block_out_channels, types)):
      attends = any(block_type.startswith("CrossAttn") for block_type in pair)
      innermost = level == levels - 1 and self.mid_block_type is not None
      if (attends or innermost) and channels % heads:
        raise UserError(f"UNet config: attention_head_dim={heads}, which means the number "
                        f"of heads, must divide the block's {channels} channels")

  @property
  def heads(self) -> tuple[int, ...]:
    """Attention heads of each level, outermost first."""
    return _per_level(self.attention_head_dim, len(self.block_out_channels))

  @property
  def resnets_per_level(self) -> tuple[int, ...]:
    """Resnets of each level's down block, outermost first."""
    return _per_level(self.layers_per_block, len(self.block_out_channels))


def sample_size(values: Mapping[str, Any]) -> Any:
  """The sample_size of a unet/config.json, read as diffusers' StableDiffusionPipeline reads it.

  Files of before diffusers 0.9 say 32 or the like of networks that were trained at 64.
  """
  size = values.get("sample_size")
  is_old = re.match(r"0\.[0-8](\D|$)", str(values.get("_diffusers_version"))) is not None
  return max(size, 64) if is_old and isinstance(size, int) else size


def _per_level(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
  return value if isinstance(value, tuple) else (value,) * levels


class GEGLU(nnx.Module):
  """A linear layer gated by the GELU of its other half (arXiv:2002.05202)."""

  def __init__(self, features: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.proj = layers.Linear(features, 2 * hidden, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return geglu(self.proj(x))


class FeedForward(nnx.Module):
  """The transformer's MLP. The checkpoint's `net.1` is a dropout without weights."""

  def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.net = nnx.Dict({
        "0": GEGLU(features, 4 * features, dtype=dtype, rngs=rngs),
        "2": layers.Linear(4 * features, features, dtype=dtype, rngs=rngs)})

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.net["2"](self.net["0"](x))


class BasicTransformerBlock(nnx.Module):
  """Self-attention, attention to the prompt, MLP; each behind a norm, with a residual.

  Attention to the prompt is where the branches of guidance part: what comes before may be
  computed once for all of them.
  """

  def __init__(self, features: int, num_heads: int, context_dim: int, *,
               dtype: DTypeLike, rngs: nnx.Rngs):
    common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
    self.norm1 = layers.LayerNorm(features, **common)
    self.attn1 = layers.Attention(features, num_heads, **common)
    self.norm2 = layers.LayerNorm(features, **common)
    self.attn2 = layers.Attention(features, num_heads, context_dim=context_dim, **common)
    self.norm3 = layers.LayerNorm(features, **common)
    self.ff = FeedForward(features, **common)

  def __call__(self, x: Float[Array, "n*B S F"], context: layers.Context,
               branches: int) -> Float[Array, "branches*n*B S F"]:
    pixels = x.shape[1]
    images = lambda rows: rows.reshape(-1, pixels, rows.shape[-1])
    rows = lambda images: images.reshape(-1, images.shape[-1])
    x = rows(x)  # or XLA copies each residual before it lets a matmul add to it
    x = x + rows(self.attn1(images(self.norm1(x))))
    x = layers.tile(x, branches) + rows(self.attn2(images(self.norm2(x)), context, branches))
    return images(x + self.ff(self.norm3(x)))


class Transformer2D(nnx.Module):
  """A transformer block over the pixels of a feature map."""

  def __init__(self, config: UNetConfig, channels: int, num_heads: int, *,
               dtype: DTypeLike, rngs: nnx.Rngs):
    common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
    projection = layers.Linear if config.use_linear_projection else layers.Conv1x1
    self.norm = layers.GroupNorm(channels, config.norm_num_groups, epsilon=1e-6, **common)
    self.proj_in = projection(channels, channels, **common)
    self.transformer_blocks = nnx.List([
        BasicTransformerBlock(channels, num_heads, config.cross_attention_dim, **common)])
    self.proj_out = projection(channels, channels, **common)

  def __call__(self, x: jax.Array, context: layers.Context, branches: int = 1) -> jax.Array:
    """Feature maps [n*B, H, W, F] -> [branches*n*B, H, W, F]; context as in the block."""
    batch, height, width, channels = x.shape
    h = self.proj_in(self.norm(x)).reshape(batch, height * width, channels)
    (block,) = self.transformer_blocks
    h = block(h, context, branches)
    return layers.tile(x, branches) + self.proj_out(h.reshape(-1, height, width, channels))


def _resnet(config: UNetConfig, in_channels: int, out_channels: int, *,
            dtype: DTypeLike, rngs: nnx.Rngs) -> layers.ResnetBlock:
  return layers.ResnetBlock(in_channels, out_channels,
                            time_dim=4 * config.block_out_channels[0],
                            num_groups=config.norm_num_groups, epsilon=config.norm_eps,
                            act_fn=config.act_fn, dtype=dtype, rngs=rngs)


def _remat(module: nnx.Module, enabled: bool,
           call: Callable[..., jax.Array] | None = None) -> Callable[..., jax.Array]:
  """The module's call, recomputed in the backward pass instead of stored if `enabled`.

  Not by `nnx.remat`, which writes the weights back to the module afterwards: those that
  came into the program from outside of a scan refuse that.
  """
  call = type(module).__call__ if call is None else call
  if not enabled:
    return functools.partial(call, module)
  graphdef, state = nnx.split(module)
  recomputed = jax.checkpoint(lambda state, *args: call(nnx.merge(graphdef, state), *args))
  return functools.partial(recomputed, state)


class DownBlock(nnx.Module):
  """One level on the way down; returns every state that the way up will read.

  The time embedding is of all branches of guidance; up to the first attention to the prompt
  they share one state.
  """

  def __init__(self, config: UNetConfig, level: int, *, dtype: DTypeLike,
               rngs: nnx.Rngs):
    common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
    channels = config.block_out_channels
    in_channels, out_channels = channels[max(level - 1, 0)], channels[level]
    count = config.resnets_per_level[level]
    cross = config.down_block_types[level] == "CrossAttnDownBlock2D"
    self.attentions = nnx.List([
        Transformer2D(config, out_channels, config.heads[level], **common)
        for _ in range(count if cross else 0)])
    self.resnets = nnx.List([
        _resnet(config, in_channels if i == 0 else out_channels, out_channels, **common)
        for i in range(count)])
    self.downsamplers = nnx.List([
        layers.Downsample(out_channels, **common)] if level < len(channels) - 1 else [])

  def __call__(self, x: jax.Array, time_embedding: jax.Array, context: layers.Context,
               remat: bool) -> tuple[jax.Array, list[jax.Array]]:
    skips = []
    for i, resnet in enumerate(self.resnets):
      x = _remat(resnet, remat)(x, time_embedding[:len(x)])
      if self.attentions:
        branches = len(time_embedding) // len(x)
        attend = functools.partial(Transformer2D.__call__, branches=branches)
        x = _remat(self.attentions[i], remat, attend)(x, context)
      skips.append(x)
    for downsample in self.downsamplers:
      x = downsample(x)
      skips.append(x)
    return x, skips


class MidBlock(nnx.Module):
  """The innermost level: resnet, attention, resnet."""

  def __init__(self, config: UNetConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
    channels = config.block_out_channels[-1]
    self.attentions = nnx.List([
        Transformer2D(config, channels, config.heads[-1], **common)])
    self.resnets = nnx.List([_resnet(config, channels, channels, **common)
                             for _ in range(2)])

  def __call__(self, x: jax.Array, time_embedding: jax.Array, context: layers.Context,
               remat: bool) -> jax.Array:
    x = _remat(self.resnets[0], remat)(x, time_embedding)
    x = _remat(self.attentions[0], remat)(x, context)
    return _remat(self.resnets[1], remat)(x, time_embedding)


class UpBlock(nnx.Module):
  """One level on the way up; each resnet also reads one state of the way down."""

  def __init__(self, config: UNetConfig, index: int, *, dtype: DTypeLike,
               rngs: nnx.Rngs):
    common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
    channels = config.block_out_channels[::-1]
    level = len(channels) - 1 - index
    below, here = channels[max(index - 1, 0)], channels[index]
    outer = channels[min(index + 1, len(channels) - 1)]
    count = config.resnets_per_level[level] + 1
    # The last skip of a level is the one that its down block was given.
    skips = [here] * (count - 1) + [outer]
    states = [below] + [here] * (count - 1)
    cross = config.up_block_types[index] == "CrossAttnUpBlock2D"
    self.attentions = nnx.List([
        Transformer2D(config, here, config.heads[level], **common)
        for _ in range(count if cross else 0)])
    self.resnets = nnx.List([_resnet(config, state + skip, here, **common)
                             for state, skip in zip(states, skips)])
    self.upsamplers = nnx.List([
        layers.Upsample(here, **common)] if index < len(channels) - 1 else [])

  def __call__(self, x: jax.Array, skips: list[jax.Array], time_embedding: jax.Array,
               context: layers.Context, size: tuple[int, int] | None,
               remat: bool) -> jax.Array:
    for i, resnet in enumerate(self.resnets):
      x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
      x = _remat(resnet, remat)(x, time_embedding)
      if self.attentions:
        x = _remat(self.attentions[i], remat)(x, context)
    for upsample in self.upsamplers:
      x = upsample(x, size)
    return x


class UNet2DConditionModel(nnx.Module):
  """Predicts the noise in latents, given the timestep and the prompt's embedding."""

  def __init__(self, config: UNetConfig, *, dtype: DTypeLike = jnp.float32,
               rngs: nnx.Rngs, gradient_checkpointing: str = "none"):
    """Builds the network.

    Args:
      config: its shape.
      dtype: of the weights and of the computation.
      rngs: initialises the weights.
      gradient_checkpointing: "none" stores every activation for the backward pass,
        "blocks" only those between resnets and attentions, "full" none at all.
    """
    if gradient_checkpointing not in GRADIENT_CHECKPOINTING:
      raise ValueError(f"{gradient_checkpointing=} must be in {GRADIENT_CHECKPOINTING}")
    common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
    channels = config.block_out_channels
    self.config = config
    self.gradient_checkpointing = gradient_checkpointing
    self.act = ACTIVATIONS[config.act_fn]
    self.conv_in = layers.Conv(config.in_channels, channels[0], **common)
    self.time_embedding = layers.TimestepEmbedding(channels[0], 4 * channels[0],
                                                   act_fn=config.act_fn, **common)
    self.down_blocks = nnx.List([DownBlock(config, level, **common)
                                 for level in range(len(channels))])
    self.mid_block = MidBlock(config, **common) if config.mid_block_type else None
    self.up_blocks = nnx.List([UpBlock(config, index, **common)
                               for index in range(len(channels))])
    self.conv_norm_out = layers.GroupNorm(channels[0], config.norm_num_groups,
                                          epsilon=config.norm_eps, **common)
    self.conv_out = layers.Conv(channels[0], config.out_channels, **common)
    # What the text embeddings go through before all blocks, see `hoisting.py`.
    self.context_projection: nnx.Module | None = nnx.data(None)

  def __call__(self, latents: Float[Array, "n*B h w C"], timesteps: Int[Array, " n*B"],
               text_embeddings: Float[Array, "B L D"]) -> Float[Array, "n*B h w C"]:
    """Denoises one step.

    Args:
      latents: of any float dtype; n in a row have the same prompt.
      timesteps: 0 to 999.
      text_embeddings: D = `config.cross_attention_dim`.

    Returns:
      In the network's dtype: noise, velocity or sample, as the checkpoint's scheduler
      config says.
    """
    return self.predict_branches(latents, timesteps, text_embeddings, 1)

  def predict_branches(self, latents: Float[Array, "n*B h w C"], timesteps: Int[Array, " n*B"],
                       text_embeddings: Float[Array, "branches*B L D"], branches: int
                       ) -> Float[Array, "branches*n*B h w C"]:
    """As a call with the latents and timesteps `branches` times over, in a row, for less.

    What does not depend on the prompt is computed once: the first resnet, and the first
    self-attention, which is among the largest.
    """
    if latents.shape[-1] != self.config.in_channels:
      raise ValueError(f"{latents.shape=} must end in {self.config.in_channels} channels")
    forward = functools.partial(type(self)._forward, branches=branches)
    return _remat(self, self.gradient_checkpointing == "full", forward)(
        latents, timesteps, text_embeddings)

  def _forward(self, latents: jax.Array, timesteps: jax.Array, context: jax.Array,
               branches: int) -> jax.Array:
    remat = self.gradient_checkpointing == "blocks"
    embedding = layers.tile(self._embed_time(timesteps), branches)
    if self.context_projection is not None:
      context = self.context_projection(context)
    x = self.conv_in(latents)
    skips = [x]
    for block in self.down_blocks:
      x, states = block(x, embedding, context, remat)
      skips += states
    # Of those from before any attention to the prompt, there is one for all branches.
    x, *skips = (layers.tile(state, len(embedding) // len(state)) for state in [x, *skips])
    if self.mid_block is not None:
      x = self.mid_block(x, embedding, context, remat)
    for up_block in self.up_blocks:
      taken = len(up_block.resnets)
      here, skips = skips[-taken:], skips[:-taken]
      size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
      x = up_block(x, here, embedding, context, size, remat)
    return self.conv_out(self.conv_norm_out(x, act=self.act))

  def _embed_time(self, timesteps: jax.Array) -> jax.Array:
    config = self.config
    embedding = layers.timestep_embedding(
        timesteps, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift)
    return self.time_embedding(embedding)
