"""Prompts -> trajectories and images: one sampling batch, as a program over all devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Protocol

from flax import nnx
import jax
from jaxtyping import Array, Float, Int, Key, UInt8

from ddpo_jax import hoisting
from ddpo_jax.compilation import compiler_options
from ddpo_jax.devices import AXIS, varying
from ddpo_jax.diffusion import DDIMSchedule, sample
from ddpo_jax.diffusion.ddim import guidance_context
from ddpo_jax.diffusion.sampler import sample_keys
from ddpo_jax.lora import Split
from ddpo_jax.models.vae import AutoencoderKL, to_uint8
from ddpo_jax.parts import map_in_parts
from ddpo_jax.shared_program import SharedProgram
from ddpo_jax.types import FirstGradient, Trajectory
from ddpo_jax.work import join_parts


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
  """What sampling needs to know; sizes are per device."""

  batch_size: int
  num_batches: int  # per epoch
  guidance_scale: float
  eta: float
  samples_at_once: int  # at most, of a batch
  decode_batch_size: int  # images decoded at a time; bounds the decoder's memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
  """One batch's trajectories and decoded images, sharded over samples."""

  trajectory: Trajectory
  images: UInt8[Array, "B H W 3"]
  gradients: Sequence[Array] = ()  # from `SharedProgram.sample`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenModels:
  """The weights that sampling reads and training never changes."""

  unet: nnx.State  # all but the trained ones
  vae: nnx.State


class Generate(Protocol):
  """A compiled sampling program, see `make_generate`."""

  def __call__(self, params: nnx.State, frozen: FrozenModels,
               negative_embedding: Float[Array, "1 L D"],
               text_embeddings: Float[Array, "B L D"], sample_indices: Int[Array, " B"],
               key: Key[Array, ""], first_gradient: FirstGradient | None = None) -> Generation:
    """The last one may be given to a `SharedProgram`'s alone."""
    ...


def make_generate(config: GenerateConfig, vae: AutoencoderKL, unet_graphdef: nnx.GraphDef,
                  schedule: DDIMSchedule, mesh: jax.sharding.Mesh) -> Generate:
  """Builds the jitted sampling program.

  Returns:
    `generate(params, frozen, negative_embedding, text_embeddings, sample_indices, key)`:
    text_embeddings [B, L, D] and sample_indices [B] int32 sharded over devices, all else
    replicated; `key` is the epoch's.
  """
  decode = _make_decode(config, vae)

  def generate(params: nnx.State, frozen: FrozenModels,
               negative_embedding: Float[Array, "1 L D"],
               text_embeddings: Float[Array, "B L D"], sample_indices: Int[Array, " B"],
               key: Key[Array, ""]) -> Generation:
    split = Split(unet_graphdef, *varying((params, frozen.unet)))
    unet = hoisting.cast_lora(hoisting.hoist_weights(split))
    keys = sample_keys(key, sample_indices)

    def draw(embeddings: jax.Array, keys: jax.Array) -> Trajectory:
      context = guidance_context(embeddings, negative_embedding, config.guidance_scale)
      policy = nnx.merge(*hoisting.hoist_prompts(unet, context))
      return sample(policy, schedule, embeddings, negative_embedding,
                    guidance_scale=config.guidance_scale, eta=config.eta, key=keys)

    trajectory = map_in_parts(draw, config.samples_at_once, text_embeddings, keys)
    return Generation(trajectory, decode(frozen.vae, trajectory.final_latents))

  mapped = jax.shard_map(generate, mesh=mesh,
                         in_specs=(jax.P(), jax.P(), jax.P(), jax.P(AXIS), jax.P(AXIS), jax.P()),
                         out_specs=jax.P(AXIS))
  return jax.jit(mapped, compiler_options=compiler_options())


def make_shared_generate(config: GenerateConfig, vae: AutoencoderKL, program: SharedProgram,
                         mesh: jax.sharding.Mesh) -> Generate:
  """As `make_generate`, but samples with the update's own program, so that both round alike."""
  decode = _make_decode(config, vae)

  def finish(vae_weights: nnx.State, parts: list[Trajectory]) -> Generation:
    trajectory = join_parts(parts, config.batch_size)
    return Generation(trajectory, decode(vae_weights, trajectory.final_latents))

  finished = jax.jit(jax.shard_map(finish, mesh=mesh, in_specs=(jax.P(), jax.P(AXIS)),
                                   out_specs=jax.P(AXIS)), compiler_options=compiler_options())

  def generate(params: nnx.State, frozen: FrozenModels,
               negative_embedding: Float[Array, "1 L D"],
               text_embeddings: Float[Array, "B L D"], sample_indices: Int[Array, " B"],
               key: Key[Array, ""], first_gradient: FirstGradient | None = None) -> Generation:
    parts, gradients = program.sample(params, frozen.unet, negative_embedding, text_embeddings,
                                      sample_indices, key, first_gradient)
    return dataclasses.replace(finished(frozen.vae, parts), gradients=gradients)

  return generate


def _make_decode(config: GenerateConfig, vae: AutoencoderKL
                 ) -> Callable[[nnx.State, jax.Array], UInt8[Array, "B H W 3"]]:
  """Builds `decode(weights, latents)`, which decodes a few clean latents at a time."""
  graphdef, scaling_factor = nnx.graphdef(vae), vae.config.scaling_factor

  def decode(weights: nnx.State, latents: Float[Array, "B h w C"]) -> UInt8[Array, "B H W 3"]:
    decoder = nnx.merge(graphdef, weights)
    return map_in_parts(lambda latents: to_uint8(decoder.decode(latents / scaling_factor)),
                        config.decode_batch_size, latents)

  return decode
