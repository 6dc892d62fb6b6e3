"""The clipped objective of PPO (arXiv:1707.06347, formula 7): pure."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PPOInfo:
  """What to watch while the loss goes down."""

  approx_kl: Float32[Array, ""]  # mean of ½ (log_prob − old)²
  clipfrac: Float32[Array, ""]  # fraction of ratios outside 1 ± clip_range
  ratio_drift: Float32[Array, ""]  # largest |ratio − 1|


def ratio_deviation(log_prob: Float[Array, "*pairs"], old_log_prob: Float[Array, "*pairs"]
                    ) -> Float[Array, "*pairs"]:
  """|r − 1|, without a gradient."""
  return jax.lax.stop_gradient(jnp.abs(jnp.exp(log_prob - old_log_prob) - 1.0))


def ppo_loss(log_prob: Float32[Array, "*pairs"], old_log_prob: Float32[Array, "*pairs"],
             advantages: Float32[Array, "*pairs"], clip_range: float, adv_clip_max: float
             ) -> tuple[Float32[Array, ""], PPOInfo]:
  """Mean of max(−A·r, −A·clip(r, 1 ± clip_range)) with r = exp(log_prob − old_log_prob).

  Args:
    log_prob: float32, of the taken steps under the policy being trained.
    old_log_prob: float32, under the policy that took them.
    advantages: float32, A before clipping to ±`adv_clip_max`.
    clip_range: how far the ratio may move before its gradient stops, above 0.
    adv_clip_max: above 0.

  Returns:
    The loss, and what to watch.

  Raises:
    ValueError: if the arguments' shapes differ or one is not float32.
  """
  for name, value in (("log_prob", log_prob), ("old_log_prob", old_log_prob),
                      ("advantages", advantages)):
    if value.shape != log_prob.shape or value.dtype != jnp.float32:
      raise ValueError(f"{name} is {value.dtype}{value.shape}; must be float32"
                       f"{log_prob.shape}: clip_range is far below bfloat16's precision")
  advantages = jnp.clip(advantages, -adv_clip_max, adv_clip_max)
  log_ratio = log_prob - old_log_prob
  ratio = jnp.exp(log_ratio)
  clipped = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
  loss = jnp.mean(jnp.maximum(-advantages * ratio, -advantages * clipped))
  deviation = ratio_deviation(log_prob, old_log_prob)
  info = PPOInfo(approx_kl=0.5 * jnp.mean(jnp.square(jax.lax.stop_gradient(log_ratio))),
                 clipfrac=jnp.mean((deviation > clip_range).astype(jnp.float32)),
                 ratio_drift=jnp.max(deviation))
  return loss, info
