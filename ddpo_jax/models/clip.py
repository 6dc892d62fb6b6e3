"""CLIP (arXiv:2103.00020): the text tower that Stable Diffusion uses, and the whole model.

Paths are those of transformers' CLIPModel, such as
`vision_model.encoder.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ddpo_jax import model_config
from ddpo_jax.errors import UserError
from ddpo_jax.models import layers
from ddpo_jax.ops import attention
from ddpo_jax.ops.activations import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """The fields of a text_encoder/config.json that shape the network."""

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  eos_token_id: int = 49407

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
    """Reads a config.json; a missing field has transformers' default.

    Raises:
      UserError: for an activation, or a mask of the padding, that is not built.
    """
    if values.get("use_attention_mask"):
      raise UserError("text encoder config: use_attention_mask=True is not supported; must be "
                      "absent or False")
    config = model_config.read_fields(cls, values)
    _check_tower("text encoder", config)
    return config


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """The fields of a vision tower's config that shape the network."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> CLIPVisionConfig:
    """Reads a config; a missing field has transformers' default.

    Raises:
      UserError: for an activation, a size or a number of channels that is not built.
    """
    config = model_config.read_fields(cls, values)
    _check_tower("vision tower", config)
    if config.num_channels != 3:
      raise UserError(f"vision tower config: num_channels={config.num_channels!r} is not "
                      "supported; must be 3")
    for field in ("image_size", "patch_size"):
      if not isinstance(getattr(config, field), int):
        raise UserError(f"vision tower config: {field}={getattr(config, field)!r} is not "
                        "supported; must be one number, for square images")
    if not 0 < config.patch_size <= config.image_size:
      raise UserError(f"vision tower config: patch_size={config.patch_size} must be in "
                      f"1..image_size={config.image_size}")
    return config


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """The config.json of a whole CLIP model."""

  text_config: CLIPTextConfig
  vision_config: CLIPVisionConfig
  projection_dim: int = 512
  logit_scale_init_value: float = 2.6592

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> CLIPConfig:
    """Reads a config.json; a missing field has transformers' default.

    Raises:
      UserError: if it is of another model, or asks for what is not built.
    """
    if values.get("model_type", "clip") != "clip":
      raise UserError(f"CLIP config: model_type={values['model_type']!r} is not supported; "
                      "must be 'clip'")
    towers = {}
    for name in ("text_config", "vision_config"):
      # Old files have both; where they differ, transformers takes this one alone.
      tower = values.get(f"{name}_dict")
      tower = values.get(name) if tower is None else tower
      if not isinstance(tower, Mapping | None):
        raise UserError(f"CLIP config: {name}={tower!r} must be an object")
      towers[name] = tower or {}
    text = CLIPTextConfig.from_dict(towers["text_config"])
    if not isinstance(text.eos_token_id, int):
      raise UserError(f"CLIP config: text_config.eos_token_id={text.eos_token_id!r} is not "
                      "supported; must be one token's id")
    vision = CLIPVisionConfig.from_dict(towers["vision_config"])
    return model_config.read_fields(cls, {**values, "text_config": text,
                                          "vision_config": vision})


@dataclasses.dataclass(frozen=True)
class CLIPImageConfig:
  """What a preprocessor_config.json says of how an image becomes the vision tower's."""

  resize_to: int | tuple[int, int]  # the short side, or (height, width)
  crop_to: int  # the side of the square in the middle
  mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]
  std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any], image_size: int) -> CLIPImageConfig:
    """Reads a preprocessor_config.json; a missing field has CLIP's value.

    Args:
      values: the file's content.
      image_size: that the vision tower takes.

    Raises:
      UserError: if it asks for what is not built, or makes images of another size.
    """
    for name, wanted in _PREPROCESSING.items():
      if (values.get(name, wanted) or False) != wanted:  # null is false
        raise UserError(f"image processor config: {name}={values[name]!r} is not "
                        f"supported; must be {wanted!r}")
    if abs(values.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
      raise UserError(f"image processor config: rescale_factor={values['rescale_factor']} "
                      "is not supported; must be 1/255")
    resize_to = _size("size", values.get("size", image_size))
    crop = _size("crop_size", values.get("crop_size", image_size))
    if crop not in (image_size, (image_size, image_size)):
      raise UserError(f"image processor config: crop_size={values['crop_size']!r} must be "
                      f"the vision tower's image_size={image_size}")
    if min(resize_to if isinstance(resize_to, tuple) else (resize_to,)) < image_size:
      raise UserError(f"image processor config: size={values['size']!r} must be at least "
                      f"crop_size={image_size}")
    colours = {field: tuple(float(x) for x in values[name]) for field, name in
               (("mean", "image_mean"), ("std", "image_std")) if name in values}
    for field, numbers in colours.items():
      if len(numbers) != 3 or field == "std" and min(numbers) <= 0:
        raise UserError(f"image processor config: image_{field}={list(numbers)} must be "
                        f"three {'positive ' * (field == 'std')}numbers")
    return cls(resize_to, image_size, **colours)


_TowerConfig = CLIPTextConfig | CLIPVisionConfig

# Fields of a preprocessor_config.json that have one supported value: 3 is bicubic.
_PREPROCESSING = {"do_resize": True, "do_center_crop": True, "do_rescale": True,
                  "do_normalize": True, "do_pad": False, "resample": 3}


def _size(field: str, value: Any) -> int | tuple[int, int]:
  """Reads a size in the three ways that files write one."""
  if isinstance(value, Mapping):
    keys = {k for k, v in value.items() if v is not None}
    if keys == {"shortest_edge"}:
      value = value["shortest_edge"]
    elif keys == {"height", "width"}:
      value = (value["height"], value["width"])
  numbers = value if isinstance(value, tuple) else (value,)
  if not all(isinstance(x, int) and x > 0 for x in numbers):
    raise UserError(f"image processor config: {field}={value!r} is not supported; must be "
                    "a number, a shortest_edge, or height and width")
  return value


def _check_tower(kind: str, config: CLIPTextConfig | CLIPVisionConfig) -> None:
  model_config.check_activation(kind, "hidden_act", config.hidden_act)
  if config.hidden_size % config.num_attention_heads:
    raise UserError(
        f"{kind} config: num_attention_heads={config.num_attention_heads} must "
        f"divide hidden_size={config.hidden_size}")


class _Embeddings(nnx.Module):

  def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    embed = lambda n: nnx.Embed(n, config.hidden_size, dtype=dtype, param_dtype=dtype,
                                rngs=rngs)
    self.token_embedding = embed(config.vocab_size)
    self.position_embedding = embed(config.max_position_embeddings)

  def __call__(self, token_ids: jax.Array) -> jax.Array:
    positions = jnp.arange(token_ids.shape[1])
    return self.token_embedding(token_ids) + self.position_embedding(positions)


class _VisionEmbeddings(nnx.Module):

  def __init__(self, config: CLIPVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    patches = (config.image_size // config.patch_size)**2
    self.class_embedding = nnx.Param(
        jax.random.normal(rngs.params(), (config.hidden_size,), dtype))
    self.patch_embedding = nnx.Conv(
        config.num_channels, config.hidden_size, (config.patch_size,) * 2,
        strides=config.patch_size, padding="VALID", use_bias=False, dtype=dtype,
        param_dtype=dtype, rngs=rngs)
    self.position_embedding = nnx.Embed(patches + 1, config.hidden_size, dtype=dtype,
                                        param_dtype=dtype, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    patches = self.patch_embedding(images)
    patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
    first = jnp.broadcast_to(self.class_embedding[...],
                             (patches.shape[0], 1, patches.shape[-1]))
    x = jnp.concatenate([first.astype(patches.dtype), patches], axis=1)
    return x + self.position_embedding(jnp.arange(x.shape[1]))


class _SelfAttention(nnx.Module):

  def __init__(self, config: _TowerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    linear = lambda: layers.Linear(config.hidden_size, config.hidden_size, dtype=dtype,
                                   rngs=rngs)
    self.num_heads = config.num_attention_heads
    self.q_proj, self.k_proj, self.v_proj = linear(), linear(), linear()
    self.out_proj = linear()

  def __call__(self, x: jax.Array, *, is_causal: bool) -> jax.Array:
    out = attention.multi_head_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x),
                                         self.num_heads, is_causal=is_causal)
    return self.out_proj(out)


class _MLP(nnx.Module):

  def __init__(self, config: _TowerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.act = ACTIVATIONS[config.hidden_act]
    self.fc1 = layers.Linear(config.hidden_size, config.intermediate_size, dtype=dtype,
                             rngs=rngs)
    self.fc2 = layers.Linear(config.intermediate_size, config.hidden_size, dtype=dtype,
                             rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fc2(self.act(self.fc1(x)))


class _EncoderLayer(nnx.Module):

  def __init__(self, config: _TowerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    norm = lambda: layers.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps,
                                    dtype=dtype, rngs=rngs)
    self.self_attn = _SelfAttention(config, dtype=dtype, rngs=rngs)
    self.layer_norm1, self.layer_norm2 = norm(), norm()
    self.mlp = _MLP(config, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, *, is_causal: bool) -> jax.Array:
    x = x + self.self_attn(self.layer_norm1(x), is_causal=is_causal)
    return x + self.mlp(self.layer_norm2(x))


class _Encoder(nnx.Module):

  def __init__(self, config: _TowerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.layers = nnx.List([_EncoderLayer(config, dtype=dtype, rngs=rngs)
                            for _ in range(config.num_hidden_layers)])

  def __call__(self, x: jax.Array, *, is_causal: bool) -> jax.Array:
    for layer in self.layers:
      x = layer(x, is_causal=is_causal)
    return x


class CLIPTextModel(nnx.Module):
  """Token ids to one embedding per token; paths begin inside `text_model`."""

  def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike = jnp.float32,
               rngs: nnx.Rngs):
    self.config = config
    self.embeddings = _Embeddings(config, dtype=dtype, rngs=rngs)
    self.encoder = _Encoder(config, dtype=dtype, rngs=rngs)
    self.final_layer_norm = layers.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

  def __call__(self, token_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Embeds prompts.

    Args:
      token_ids: L at most `max_position_embeddings`.

    Returns:
      The last layer's states after the final norm.
    """
    return self.final_layer_norm(self.encoder(self.embeddings(token_ids), is_causal=True))

  def pool(self, states: Float[Array, "B L D"], token_ids: Int[Array, "B L"]
           ) -> Float[Array, "B D"]:
    """The states at the end of each text."""
    if self.config.eos_token_id == 2:
      # Configs of before 2023 say so wrongly: there the end is the largest id.
      end = jnp.argmax(token_ids, axis=1)
    else:
      end = jnp.argmax(token_ids == self.config.eos_token_id, axis=1)
    return jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]


class CLIPVisionModel(nnx.Module):
  """Images to one embedding per patch; paths begin inside `vision_model`."""

  def __init__(self, config: CLIPVisionConfig, *, dtype: DTypeLike = jnp.float32,
               rngs: nnx.Rngs):
    norm = lambda: layers.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps,
                                    dtype=dtype, rngs=rngs)
    self.config = config
    self.embeddings = _VisionEmbeddings(config, dtype=dtype, rngs=rngs)
    self.pre_layrnorm = norm()  # spelled as in the files
    self.encoder = _Encoder(config, dtype=dtype, rngs=rngs)
    self.post_layernorm = norm()

  def __call__(self, images: Float[Array, "B S S 3"]) -> Float[Array, "B L D"]:
    """Embeds images.

    Args:
      images: S is the config's `image_size`; normalised.

    Returns:
      The last layer's states: of the whole image, then of each patch.
    """
    size = self.config.image_size
    if images.shape[1:] != (size, size, 3):
      raise ValueError(f"{images.shape=} must be [B, {size}, {size}, 3]")
    x = self.pre_layrnorm(self.embeddings(images))
    return self.encoder(x, is_causal=False)

  def pool(self, states: Float[Array, "B L D"]) -> Float[Array, "B D"]:
    """The whole image's embedding."""
    return self.post_layernorm(states[:, 0])


class CLIPModel(nnx.Module):
  """Both towers, and their projections to the space that images and texts share."""

  def __init__(self, config: CLIPConfig, *, dtype: DTypeLike = jnp.float32,
               rngs: nnx.Rngs):
    projection = lambda tower: layers.Linear(tower.hidden_size, config.projection_dim,
                                             use_bias=False, dtype=dtype, rngs=rngs)
    self.config = config
    self.text_model = CLIPTextModel(config.text_config, dtype=dtype, rngs=rngs)
    self.vision_model = CLIPVisionModel(config.vision_config, dtype=dtype, rngs=rngs)
    self.text_projection = projection(config.text_config)
    self.visual_projection = projection(config.vision_config)
    # float32 whatever the rest is: bfloat16 would move its exponential by a percent.
    self.logit_scale = nnx.Param(jnp.float32(config.logit_scale_init_value))

  def embed_texts(self, token_ids: Int[Array, "B L"]) -> Float[Array, "B P"]:
    """The texts' projections, not normalised."""
    states = self.text_model(token_ids)
    return self.text_projection(self.text_model.pool(states, token_ids))

  def embed_images(self, images: Float[Array, "B S S 3"]) -> Float[Array, "B P"]:
    """The projections of normalised images, themselves not normalised."""
    return self.visual_projection(self.vision_model.pool(self.vision_model(images)))
