"""CLIP (arXiv:2103.00020): the text tower of Stable Diffusion 1.x and 2.x, and both towers."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from ddpo_jax.models import layers
from ddpo_jax.types import UserError


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
  eos_token_id: int = 49407  # of the token whose state stands for the whole text

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
    """Reads a config.json; a missing field has transformers' default.

    Raises:
      UserError: for an activation that is not built.
    """
    config = cls(**_known_fields(cls, values))
    _check_tower("text encoder", config)
    return config


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """The fields of a config.json's vision_config that shape the network."""

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
    """As `CLIPTextConfig.from_dict`."""
    config = cls(**_known_fields(cls, values))
    _check_tower("CLIP vision", config)
    if config.image_size % config.patch_size:
      raise UserError(f"CLIP vision config: patch_size={config.patch_size} must divide "
                      f"image_size={config.image_size}")
    return config


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """A CLIP checkpoint's config.json."""

  text: CLIPTextConfig
  vision: CLIPVisionConfig
  projection_dim: int = 512

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> CLIPConfig:
    """Reads a config.json of model_type "clip".

    Raises:
      UserError: if it is of another model, or asks for what is not built.
    """
    if values.get("model_type") != "clip":
      raise UserError(f"CLIP config: model_type={values.get('model_type')!r} is not "
                      "supported; must be 'clip', with a text and a vision tower")
    text, vision = (values.get(name) or {} for name in ("text_config", "vision_config"))
    return cls(text=CLIPTextConfig.from_dict(text), vision=CLIPVisionConfig.from_dict(vision),
               **_known_fields(cls, values))


def _known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
  fields = {field.name for field in dataclasses.fields(cls)}
  return {name: value for name, value in values.items() if name in fields}


def _check_tower(kind: str, config: CLIPTextConfig | CLIPVisionConfig) -> None:
  layers.check_activation(kind, "hidden_act", config.hidden_act)
  if config.hidden_size % config.num_attention_heads:
    raise UserError(f"{kind} config: num_attention_heads={config.num_attention_heads} must "
                    f"divide hidden_size={config.hidden_size}")


class _Embeddings(nnx.Module):

  def __init__(self, config: CLIPTextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    embed = lambda n: nnx.Embed(n, config.hidden_size, dtype=dtype, param_dtype=dtype,
                                rngs=rngs)
    self.token_embedding = embed(config.vocab_size)
    self.position_embedding = embed(config.max_position_embeddings)

  def __call__(self, token_ids: jax.Array) -> jax.Array:
    positions = jnp.arange(token_ids.shape[1])
    return self.token_embedding(token_ids) + self.position_embedding(positions)


class _SelfAttention(nnx.Module):

  def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    linear = lambda: layers.Linear(config.hidden_size, config.hidden_size, dtype=dtype,
                                   rngs=rngs)
    self.num_heads = config.num_attention_heads
    self.q_proj, self.k_proj, self.v_proj = linear(), linear(), linear()
    self.out_proj = linear()

  def __call__(self, x: jax.Array, *, is_causal: bool) -> jax.Array:
    out = layers.multi_head_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x),
                                      self.num_heads, is_causal=is_causal)
    return self.out_proj(out)


class _MLP(nnx.Module):

  def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.act = layers.ACTIVATIONS[config.hidden_act]
    self.fc1 = layers.Linear(config.hidden_size, config.intermediate_size, dtype=dtype,
                             rngs=rngs)
    self.fc2 = layers.Linear(config.intermediate_size, config.hidden_size, dtype=dtype,
                             rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fc2(self.act(self.fc1(x)))


class _EncoderLayer(nnx.Module):

  def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    norm = lambda: layers.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps,
                                    dtype=dtype, rngs=rngs)
    self.self_attn = _SelfAttention(config, dtype=dtype, rngs=rngs)
    self.layer_norm1, self.layer_norm2 = norm(), norm()
    self.mlp = _MLP(config, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, *, is_causal: bool) -> jax.Array:
    x = x + self.self_attn(self.layer_norm1(x), is_causal=is_causal)
    return x + self.mlp(self.layer_norm2(x))


class _Encoder(nnx.Module):

  def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.layers = nnx.List([_EncoderLayer(config, dtype=dtype, rngs=rngs)
                            for _ in range(config.num_hidden_layers)])

  def __call__(self, x: jax.Array, *, is_causal: bool) -> jax.Array:
    for layer in self.layers:
      x = layer(x, is_causal=is_causal)
    return x


class CLIPTextModel(nnx.Module):
  """Token ids to one embedding per token; paths are without the `text_model.` prefix."""

  def __init__(self, config: CLIPTextConfig, *, dtype: jnp.dtype = jnp.float32,
               rngs: nnx.Rngs):
    self.config = config
    self.embeddings = _Embeddings(config, dtype=dtype, rngs=rngs)
    self.encoder = _Encoder(config, dtype=dtype, rngs=rngs)
    self.final_layer_norm = layers.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

  def __call__(self, token_ids: jax.Array) -> jax.Array:
    """Embeds prompts.

    Args:
      token_ids: [B, L] int32, L at most `max_position_embeddings`.

    Returns:
      [B, L, D], the last layer's states after the final norm.
    """
    return self.final_layer_norm(self.encoder(self.embeddings(token_ids), is_causal=True))


class _VisionEmbeddings(nnx.Module):

  def __init__(self, config: CLIPVisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    features, patch = config.hidden_size, config.patch_size
    self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (features,), dtype))
    self.patch_embedding = nnx.Conv(
        config.num_channels, features, (patch, patch), strides=patch, padding="VALID",
        use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
    self.position_embedding = nnx.Embed((config.image_size // patch)**2 + 1, features,
                                        dtype=dtype, param_dtype=dtype, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    patches = self.patch_embedding(images)
    patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
    whole = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype),
                             (patches.shape[0], 1, patches.shape[-1]))
    tokens = jnp.concatenate([whole, patches], axis=1)
    return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class CLIPVisionModel(nnx.Module):
  """Images to one embedding for each."""

  def __init__(self, config: CLIPVisionConfig, *, dtype: jnp.dtype = jnp.float32,
               rngs: nnx.Rngs):
    norm = lambda: layers.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps,
                                    dtype=dtype, rngs=rngs)
    self.config = config
    self.embeddings = _VisionEmbeddings(config, dtype=dtype, rngs=rngs)
    self.pre_layrnorm = norm()  # transformers' spelling
    self.encoder = _Encoder(config, dtype=dtype, rngs=rngs)
    self.post_layernorm = norm()

  def __call__(self, images: jax.Array) -> jax.Array:
    """[B, image_size, image_size, 3], normalised -> [B, D], the class token's state."""
    x = self.encoder(self.pre_layrnorm(self.embeddings(images)), is_causal=False)
    return self.post_layernorm(x[:, 0])


class CLIPModel(nnx.Module):
  """Both towers and their projections into the space where they are compared."""

  def __init__(self, config: CLIPConfig, *, dtype: jnp.dtype = jnp.float32,
               rngs: nnx.Rngs):
    project = lambda features: layers.Linear(features, config.projection_dim,
                                             use_bias=False, dtype=dtype, rngs=rngs)
    self.config = config
    self.text_model = CLIPTextModel(config.text, dtype=dtype, rngs=rngs)
    self.vision_model = CLIPVisionModel(config.vision, dtype=dtype, rngs=rngs)
    self.text_projection = project(config.text.hidden_size)
    self.visual_projection = project(config.vision.hidden_size)
    self.logit_scale = nnx.Param(jnp.zeros((), jnp.float32))

  def embed_images(self, images: jax.Array) -> jax.Array:
    """[B, image_size, image_size, 3], normalised -> [B, projection_dim]."""
    return self.visual_projection(self.vision_model(images))

  def embed_texts(self, token_ids: jax.Array) -> jax.Array:
    """[B, L] int32, each with an end-of-text token -> [B, projection_dim]."""
    states = self.text_model(token_ids)
    eos = self.config.text.eos_token_id
    # Configs from before the field was right say 2; the end token has the highest id there.
    marks = token_ids if eos == 2 else token_ids == eos
    end = jnp.argmax(marks, axis=1)
    return self.text_projection(jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0])
