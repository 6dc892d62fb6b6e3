"""The clipped objective: values worked by hand, and a NumPy port beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.ppo import ppo_loss


def test_worked_by_hand():
  old = jnp.zeros(3)
  ratio = np.array([1.5, 0.5, 1.05])
  advantages = jnp.array([2.0, -1.0, 10.0])
  loss, info = ppo_loss(jnp.log(jnp.asarray(ratio, jnp.float32)), old, advantages,
                        clip_range=0.1, adv_clip_max=5.0)
  # sample 0: max(-2 * 1.5, -2 * 1.1) = -2.2, clipped: too far in the right direction
  # sample 1: max(1 * 0.5, 1 * 0.9) = 0.9, clipped likewise
  # sample 2: A is cut to 5; max(-5 * 1.05, -5 * 1.05) = -5.25, inside the range
  assert float(loss) == pytest.approx((-2.2 + 0.9 - 5.25) / 3, rel=1e-6)
  assert float(info.clipfrac) == pytest.approx(2 / 3)
  assert float(info.ratio_drift) == pytest.approx(0.5, rel=1e-6)
  assert float(info.approx_kl) == pytest.approx(0.5 * np.mean(np.log(ratio) ** 2), rel=1e-5)


def test_against_numpy():
  rng = np.random.default_rng(0)
  log_prob, old, advantages = rng.normal(size=(3, 64)).astype(np.float32)
  loss, _ = ppo_loss(jnp.asarray(log_prob), jnp.asarray(old), jnp.asarray(advantages),
                     0.2, 1.0)
  clipped = np.clip(advantages, -1, 1)
  ratio = np.exp(log_prob - old)
  expected = np.maximum(-clipped * ratio, -clipped * np.clip(ratio, 0.8, 1.2)).mean()
  assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_gradient_stops_outside_the_range():
  gradient = jax.grad(lambda x: ppo_loss(x, jnp.zeros(2), jnp.array([1.0, 1.0]), 0.1,
                                         5.0)[0])(jnp.array([0.3, 0.05]))
  assert gradient[0] == 0 and gradient[1] < 0


@pytest.mark.parametrize("bad", (jnp.zeros(3), jnp.zeros(2, jnp.bfloat16)))
def test_shapes_and_dtypes_are_checked(bad):
  with pytest.raises(ValueError, match="float32"):
    ppo_loss(jnp.zeros(2), bad, jnp.zeros(2), 0.1, 5.0)
