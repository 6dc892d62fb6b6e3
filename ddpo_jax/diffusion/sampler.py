"""The DDIM sampler: one scan over the steps, keeping the trajectory and its likelihood."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key, UInt32

from ddpo_jax.diffusion import ddim
from ddpo_jax.diffusion.schedule import DDIMSchedule
from ddpo_jax.errors import UserError
from ddpo_jax.types import Policy, Trajectory

AnyKey = Key[Array, "*B"] | UInt32[Array, "*B words"]  # of jax.random.key, of PRNGKey


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Step:
  """What the scan reads at each step."""

  index: jax.Array  # [] int32
  noise: jax.Array | None  # [B, h, w, C], or None to draw it


@functools.partial(jax.jit, static_argnames=("guidance_scale", "eta", "latent_size"))
def sample(unet: Policy, schedule: DDIMSchedule, text_embeddings: Float[Array, "B L D"],
           negative_embeddings: Float[Array, "#B L D"], *, guidance_scale: float = 5.0,
           eta: float = 1.0, key: AnyKey | None = None,
           latent_size: tuple[int, int] | None = None,
           initial_latents: Float[Array, "B h w C"] | None = None,
           step_noise: Float[Array, "T B h w C"] | None = None) -> Trajectory:
  """Samples one trajectory for each prompt.

  A sample's draw depends on its own key alone, not on the batch that it is in.

  Args:
    unet: the policy: an NNX module, or another callable pytree
      (`jax.tree_util.Partial`).
    schedule: with T steps.
    text_embeddings: of the prompts.
    negative_embeddings: of the empty prompt, [B, L, D] or [1, L, D].
    guidance_scale: classifier-free guidance; up to 1 means none.
    eta: in (0, 1], the noise of each step relative to DDPM's.
    key: one key, of which sample i gets `fold_in(key, i)`; or one key a sample, [B]; made by
      `jax.random.key` or `jax.random.PRNGKey`. Not needed where `initial_latents` and
      `step_noise` are both given.
    latent_size: (h, w); the UNet's own `sample_size` where absent.
    initial_latents: standard normal: replays another draw.
    step_noise: standard normal: likewise.

  Returns:
    The trajectory: latents [B, T+1, h, w, C] from pure noise to clean (not yet divided
    by the VAE's scaling factor), log_probs [B, T].

  Raises:
    ValueError: if `eta` is not in (0, 1], if there is neither a key nor a draw, or if there is
      not a key for each sample.
    UserError: if the model's schedule leaves a step without variance, and so without density.
  """
  ddim.check_density(schedule, eta)
  batch = text_embeddings.shape[0]
  keys = None if key is None else _one_key_per_sample(key, batch)
  if initial_latents is None:
    shape = (*(latent_size or native_size(unet)), unet.config.in_channels)
    initial_latents = draw_noise(keys, 0, shape)
  latents = initial_latents.astype(jnp.float32)

  def body(latents: jax.Array, step: _Step) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    noise = step.noise
    if noise is None:
      noise = draw_noise(keys, step.index + 1, latents.shape[1:])
    latents, log_probs = ddim.policy_step(
        unet, schedule, jnp.full(batch, step.index), latents, text_embeddings,
        negative_embeddings, guidance_scale=guidance_scale, eta=eta, noise=noise)
    return latents, (latents, log_probs)

  steps = _Step(index=jnp.arange(schedule.num_steps), noise=step_noise)
  _, (visited, log_probs) = jax.lax.scan(body, latents, steps)
  visited = jnp.concatenate([latents[None], visited])
  return Trajectory(latents=jnp.moveaxis(visited, 0, 1), log_probs=log_probs.T)


@functools.partial(jax.jit, static_argnames=("guidance_scale", "eta"))
def denoise(unet: Policy, schedule: DDIMSchedule, text_embeddings: Float[Array, "B L D"],
            negative_embeddings: Float[Array, "#B L D"], *, guidance_scale: float = 5.0,
            eta: float = 1.0, key: AnyKey) -> Float32[Array, "B h w C"]:
  """`sample` for those who only want the images: the clean latents.

  Draws what `sample` draws from the same key, and takes an `eta` of 0 as well, where each
  step is deterministic.

  Raises:
    ValueError: if eta is not in [0, 1], or if there is not a key for each sample.
  """
  if not 0.0 <= eta <= 1.0:
    raise ValueError(f"{eta=} must be in [0, 1]")
  keys = _one_key_per_sample(key, text_embeddings.shape[0])
  latents = draw_noise(keys, 0, (*native_size(unet), unet.config.in_channels))

  def body(latents: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
    step = jnp.full(latents.shape[0], index)
    prediction = ddim.guided_prediction(
        unet, latents, schedule.timesteps[step], text_embeddings, negative_embeddings,
        guidance_scale)
    mean, std = ddim.ddim_mean_and_std(schedule, prediction, step, latents, eta)
    return mean + std * draw_noise(keys, index + 1, latents.shape[1:]), None

  return jax.lax.scan(body, latents, jnp.arange(schedule.num_steps))[0]


def _one_key_per_sample(key: AnyKey, batch: int) -> Key[Array, " B"]:
  """One key a sample, of the new type."""
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.wrap_key_data(key)
  if key.shape not in ((), (batch,)):
    raise ValueError(f"key has shape {key.shape}; must be [], one key, or [{batch}], one for "
                     "each sample")
  if key.ndim:
    return key
  return sample_keys(key, jnp.arange(batch))


def sample_keys(key: Key[Array, ""], indices: Int[Array, " B"]) -> Key[Array, " B"]:
  """The keys of the samples with these indices."""
  return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def draw_noise(keys: Key[Array, " B"] | None, index: Int[Array, "#B"] | Int[Array, ""] | int,
               shape: tuple[int, ...]) -> Float32[Array, "B h w C"]:
  """Each sample's noise number `index`; 0 is the initial latents, i + 1 that of step i."""
  if keys is None:
    raise ValueError("give a key, or initial_latents and step_noise")
  draw = lambda key, index: jax.random.normal(jax.random.fold_in(key, index), shape)
  return jax.vmap(draw)(keys, jnp.broadcast_to(index, keys.shape))


def native_size(unet: Policy) -> tuple[int, int]:
  """Height and width of the latents that the network was trained for.

  Raises:
    UserError: if its config does not say.
  """
  size = unet.config.sample_size
  sizes = (size, size) if isinstance(size, int) else tuple(size or ())
  if len(sizes) != 2 or not all(isinstance(x, int) and x > 0 for x in sizes):
    raise UserError(f"the UNet's config: sample_size={size!r} must be the size of its latents, "
                    "such as 64, or their height and width")
  return sizes
