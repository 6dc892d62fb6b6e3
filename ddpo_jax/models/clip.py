"""CLIP's text tower (arXiv:2103.00020), as Stable Diffusion 1.x and 2.x use it."""

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

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
    """Reads a config.json; a missing field has transformers' default.

    Raises:
      UserError: for an activation that is not built.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    config = cls(**{k: v for k, v in values.items() if k in fields})
    layers.check_activation("text encoder", "hidden_act", config.hidden_act)
    if config.hidden_size % config.num_attention_heads:
      raise UserError(
          f"text encoder config: num_attention_heads={config.num_attention_heads} must "
          f"divide hidden_size={config.hidden_size}")
    return config


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

  def __init__(self, config: CLIPTextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
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

  def __init__(self, config: CLIPTextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.act = layers.ACTIVATIONS[config.hidden_act]
    self.fc1 = layers.Linear(config.hidden_size, config.intermediate_size, dtype=dtype,
                             rngs=rngs)
    self.fc2 = layers.Linear(config.intermediate_size, config.hidden_size, dtype=dtype,
                             rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fc2(self.act(self.fc1(x)))


class _EncoderLayer(nnx.Module):

  def __init__(self, config: CLIPTextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    norm = lambda: layers.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps,
                                    dtype=dtype, rngs=rngs)
    self.self_attn = _SelfAttention(config, dtype=dtype, rngs=rngs)
    self.layer_norm1, self.layer_norm2 = norm(), norm()
    self.mlp = _MLP(config, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, *, is_causal: bool) -> jax.Array:
    x = x + self.self_attn(self.layer_norm1(x), is_causal=is_causal)
    return x + self.mlp(self.layer_norm2(x))


class _Encoder(nnx.Module):

  def __init__(self, config: CLIPTextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
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
