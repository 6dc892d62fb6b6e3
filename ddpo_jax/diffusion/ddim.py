"""One DDIM step as a Gaussian policy (arXiv:2010.02502), and its log-probability.

DDPO (arXiv:2305.13301) reads x_{t−1} ~ N(μ_θ(x_t, t, c), σ_t²) as an action. Sampler and
update share `guided_prediction` and `ddim_step`. As two programs they agree up to rounding,
which suffices in float32; `shared_program.py` makes them agree exactly in half precision.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from ddpo_jax.diffusion.schedule import DDIMSchedule
from ddpo_jax.errors import UserError
from ddpo_jax.types import BranchingDenoiser, Denoiser


def uses_guidance(guidance_scale: float) -> bool:
  """The one rule for sampler and update: a scale up to 1 means no guidance."""
  return guidance_scale > 1.0


def guidance_context(text_embeddings: Float[Array, "B L D"],
                     negative_embeddings: Float[Array, "#B L D"],
                     guidance_scale: float) -> Float[Array, "branches*B L D"]:
  """The network's text input in `guided_prediction`: [negative; prompts], or prompts alone."""
  if not uses_guidance(guidance_scale):
    return text_embeddings
  negative = jnp.broadcast_to(negative_embeddings, text_embeddings.shape)
  return jnp.concatenate([negative, text_embeddings])


def guided_prediction(unet: Denoiser, latents: Float[Array, "n*B h w C"],
                      timesteps: Int[Array, " n*B"], text_embeddings: Float[Array, "B L D"],
                      negative_embeddings: Float[Array, "#B L D"],
                      guidance_scale: float) -> Float32[Array, "n*B h w C"]:
  """Classifier-free guidance (arXiv:2207.12598), both branches in one batch.

  Args:
    unet: the network.
    latents: x_t; n in a row have the same prompt.
    timesteps: what the network is told, in its own 0..999.
    text_embeddings: of the prompts.
    negative_embeddings: of the empty prompt, [B, L, D] or [1, L, D].
    guidance_scale: s in ε_empty + s·(ε_prompt − ε_empty); up to 1 means no guidance.
  """
  context = guidance_context(text_embeddings, negative_embeddings, guidance_scale)
  if not uses_guidance(guidance_scale):
    return unet(latents, timesteps, context).astype(jnp.float32)
  if isinstance(unet, BranchingDenoiser):
    both = unet.predict_branches(latents, timesteps, context, 2)
  else:
    twice = lambda x: jnp.concatenate([x, x])
    both = unet(twice(latents), twice(timesteps), context)
  unconditional, conditional = jnp.split(both.astype(jnp.float32), 2)
  return unconditional + guidance_scale * (conditional - unconditional)


def predict_clean(
    schedule: DDIMSchedule, model_output: Float[Array, "B h w C"], step: Int[Array, " B"],
    latents: Float[Array, "B h w C"]
) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
  """The clean latents and the noise that the network's output stands for.

  Returns:
    x̂_0 (clipped or thresholded as the model's scheduler config says) and ε̂ (from
    before the clipping).
  """
  config = schedule.noise_schedule
  signal_root, noise_root = (  # sqrt(ᾱ_t) and sqrt(1 − ᾱ_t)
      jnp.sqrt(_per_sample(x, step))
      for x in (schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod))
  if config.prediction_type == "epsilon":
    noise = model_output
    clean = (latents - noise_root * noise) / signal_root
  elif config.prediction_type == "v_prediction":
    clean = signal_root * latents - noise_root * model_output
    noise = signal_root * model_output + noise_root * latents
  else:
    clean = model_output
    noise = (latents - signal_root * clean) / noise_root
  if config.thresholding:
    clean = _threshold(clean, config.dynamic_thresholding_ratio, config.sample_max_value)
  elif config.clip_sample:
    clean = jnp.clip(clean, -config.clip_sample_range, config.clip_sample_range)
  return clean, noise


def ddim_mean_and_std(
    schedule: DDIMSchedule, model_output: Float[Array, "B h w C"], step: Int[Array, " B"],
    latents: Float[Array, "B h w C"], eta: float
) -> tuple[Float32[Array, "B h w C"], Float32[Array, "B 1 1 1"]]:
  """μ and σ of the next latents: formulas 12 and 16 of arXiv:2010.02502.

  Returns:
    μ and σ; σ is 0 at `eta` 0.
  """
  model_output, latents = (x.astype(jnp.float32) for x in (model_output, latents))
  clean, noise = predict_clean(schedule, model_output, step, latents)
  variance = eta**2 * _per_sample(schedule.variances, step)
  direction = jnp.sqrt(jnp.maximum(
      _per_sample(schedule.one_minus_alphas_cumprod_prev, step) - variance, 0.0))
  signal = jnp.sqrt(_per_sample(schedule.alphas_cumprod_prev, step))
  return signal * clean + direction * noise, jnp.sqrt(variance)


def gaussian_log_prob(x: Float[Array, " B *rest"], mean: Float[Array, " B *rest"],
                      std: Float[Array, "B *#rest"]) -> Float[Array, " B"]:
  """log N(x; mean, std²), averaged over all axes but the first."""
  density = (-jnp.square(x - mean) / (2 * jnp.square(std)) - jnp.log(std)
             - 0.5 * math.log(2 * math.pi))
  return density.mean(axis=tuple(range(1, density.ndim)))


def ddim_step(
    schedule: DDIMSchedule, model_output: Float[Array, "B h w C"], step: Int[Array, " B"],
    latents: Float[Array, "B h w C"], eta: float = 1.0, *,
    noise: Float[Array, "B h w C"] | None = None,
    prev_latents: Float[Array, "B h w C"] | None = None
) -> tuple[Float32[Array, "B h w C"], Float32[Array, " B"]]:
  """Takes one step, or scores one that was taken.

  Args:
    schedule: with T steps.
    model_output: the network's (guided) prediction.
    step: 0 for the first denoising step, T − 1 for the last.
    latents: x_t.
    eta: in (0, 1]; 1 is DDPM's variance.
    noise: standard normal: the step to take. Or else
    prev_latents: the step that was taken; no gradient flows into it.

  Returns:
    The next latents and their log-probability, the Gaussian log density averaged (not
    summed) over the elements.

  Raises:
    ValueError: if not exactly one of `noise` and `prev_latents` is given, if latents are not
      [B, h, w, C], or if `eta` leaves the step without a density.
    UserError: if the model's schedule does (a step that begins at timestep 0).
  """
  check_density(schedule, eta)
  if latents.ndim != 4:
    raise ValueError(f"latents {latents.shape} must be [B, h, w, C]")
  if (noise is None) == (prev_latents is None):
    raise ValueError("give either noise (to sample) or prev_latents (to score)")
  mean, std = ddim_mean_and_std(schedule, model_output, step, latents, eta)
  if noise is not None:
    prev_latents = mean + std * noise.astype(jnp.float32)
  prev_latents = jax.lax.stop_gradient(jnp.asarray(prev_latents, jnp.float32))
  return prev_latents, gaussian_log_prob(prev_latents, mean, std)


def check_density(schedule: DDIMSchedule, eta: float) -> None:
  """Refuses an eta (ValueError) or a model's schedule (UserError) without likelihood."""
  if not 0.0 < eta <= 1.0:
    raise ValueError(f"{eta=} must be in (0, 1]: at 0 a step is deterministic and has no "
                     "log-probability")
  if not schedule.has_density:
    raise UserError("scheduler config: the last step starts at timestep 0, which has no "
                    "variance and so no log-probability; must have timestep_spacing "
                    "'leading' with a steps_offset of 1, or 'trailing'")


def policy_step(
    unet: Denoiser, schedule: DDIMSchedule, step: Int[Array, " n*B"],
    latents: Float[Array, "n*B h w C"], text_embeddings: Float[Array, "B L D"],
    negative_embeddings: Float[Array, "#B L D"], *, guidance_scale: float, eta: float,
    noise: Float[Array, "n*B h w C"] | None = None,
    prev_latents: Float[Array, "n*B h w C"] | None = None
) -> tuple[Float32[Array, "n*B h w C"], Float32[Array, " n*B"]]:
  """Runs `guided_prediction` and then `ddim_step`: arguments of both, results of the latter."""
  prediction = guided_prediction(unet, latents, schedule.timesteps[step], text_embeddings,
                                 negative_embeddings, guidance_scale)
  return ddim_step(schedule, prediction, step, latents, eta, noise=noise,
                   prev_latents=prev_latents)


def _per_sample(values: Float[Array, " T"], step: Int[Array, " B"]) -> Float[Array, "B 1 1 1"]:
  """Each sample's entry of a [T] table, shaped to broadcast against its latents."""
  return values[step].reshape(-1, 1, 1, 1)


def _threshold(clean: Float[Array, "B h w C"], ratio: float, max_value: float
               ) -> Float[Array, "B h w C"]:
  """Dynamic thresholding (arXiv:2205.11487, section 2.3), per sample."""
  bound = jnp.quantile(jnp.abs(clean), ratio, axis=(1, 2, 3), keepdims=True)
  bound = jnp.clip(bound, 1.0, max_value)
  return jnp.clip(clean, -bound, bound) / bound
