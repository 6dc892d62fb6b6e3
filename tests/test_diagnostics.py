"""Warnings about metrics that show that a run does not learn."""


import numpy as np
import pytest
from runs import HEALTHY
from small_model import small_config

from ddpo_jax import diagnostics
from ddpo_jax.config import resolve


@pytest.mark.parametrize("trouble,words", [
    ({"ratio_drift": 2e-5}, ("ratio_drift", "train.clip_range=0.0001", "sample.batch_size")),
    ({"diversity": 0.05}, ("diversity=0.05 is down from 0.3", "train.learning_rate")),
    ({"reward_std": 0.0}, ("reward_std=0", "reward_fn=")),
    ({"skipped_steps": 4, "loss": float("nan")}, ("skipped_steps=4", "nothing was learned")),
    ({"clipfrac": 0.97}, ("clipfrac=0.97", "train.learning_rate=0.01")),
])
def test_trouble_is_said_once(trouble, words):
  watch = diagnostics.Watch(resolve(small_config()))
  assert watch.new_warnings(HEALTHY) == []
  (line,) = watch.new_warnings(HEALTHY | trouble)
  assert all(word in line for word in words), line
  assert "\n" not in line
  assert watch.new_warnings(HEALTHY | trouble) == []


@pytest.mark.parametrize("quiet,trouble", [
    ({"ratio_drift": 0.9e-5}, {"ratio_drift": 1.1e-5}),
    ({"diversity": 0.08}, {"diversity": 0.07}),
    ({"clipfrac": 0.89}, {"clipfrac": 0.91}),
    ({"reward_mean": -50.0, "reward_std": 6e-4}, {"reward_mean": -50.0, "reward_std": 4e-4}),
    ({}, {"reward_mean": 0.0, "reward_std": 0.0}),
    ({"skipped_steps": 4}, {"skipped_steps": 4, "loss": float("nan")}),
])
def test_where_trouble_begins(quiet, trouble):
  """Rewards may be negative, as jpeg_compressibility's are."""
  watch = diagnostics.Watch(resolve(small_config()))
  assert watch.new_warnings(HEALTHY) == []
  assert watch.new_warnings(HEALTHY | quiet) == []
  assert len(watch.new_warnings(HEALTHY | trouble)) == 1


def test_drift_that_was_not_to_be_cured():
  cfg = resolve(small_config(**{"train.recompute_log_probs": False}))
  (line,) = diagnostics.Watch(cfg).new_warnings(HEALTHY | {"ratio_drift": 2e-5})
  assert "set train.recompute_log_probs=True" in line


def test_diversity_is_compared_with_the_runs_largest():
  """Which need not be the first epoch's, nor the last one's."""
  watch = diagnostics.Watch(resolve(small_config()))
  for diversity in (0.1, 0.3, 0.09):
    assert watch.new_warnings(HEALTHY | {"diversity": diversity}) == []
  (line,) = watch.new_warnings(HEALTHY | {"diversity": 0.07})
  assert "diversity=0.07 is down from 0.3" in line


def test_a_run_of_single_images_has_no_diversity_to_lose():
  watch = diagnostics.Watch(resolve(small_config()))
  assert watch.new_warnings(HEALTHY | {"diversity": 0.0}) == []


@pytest.mark.parametrize("precision,remedy", (
    ("no", "lower the learning rate"), ("fp16", "The loss scale has been lowered")))
def test_a_gradient_that_is_never_finite_is_trouble_whatever_the_loss(precision, remedy):
  """An epoch's means are then of the skipped steps."""
  watch = diagnostics.Watch(resolve(small_config(mixed_precision=precision)))
  (line,) = watch.new_warnings(HEALTHY | {"skipped_steps": 4, "grad_norm": float("inf")})
  assert "skipped_steps=4" in line and "nothing was learned" in line and remedy in line


def test_diversity():
  black, white = np.zeros((2, 32, 32, 3), np.uint8), np.full((2, 32, 32, 3), 255, np.uint8)
  assert diagnostics.diversity(black) == 0
  # Of the 12 ordered pairs of 4 images, 8 are of a black and a white one.
  np.testing.assert_allclose(diagnostics.diversity(np.concatenate([black, white])), 8 / 12)
  assert diagnostics.diversity(black[:1]) == 0
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (5, 48, 48, 3), np.uint8)
  small = images.reshape(5, 16, 3, 16, 3, 3).mean(axis=(2, 4)) / 255
  pairs = [np.sqrt(((a - b)**2).mean()) for i, a in enumerate(small) for b in small[:i]]
  np.testing.assert_allclose(diagnostics.diversity(images), np.mean(pairs), rtol=1e-2)
  for image in rng.integers(0, 256, (40, 16, 16, 3), np.uint8):
    # For some of these the squared difference is rounded to less than 0.
    np.testing.assert_allclose(diagnostics.diversity(np.stack([image] * 2)), 0, atol=1e-6)


def test_diversity_is_of_the_first_128_images():
  images = np.random.default_rng(0).integers(0, 256, (140, 16, 16, 3), np.uint8)
  images[128:] = 0
  assert diagnostics.diversity(images) == diagnostics.diversity(images[:128])
