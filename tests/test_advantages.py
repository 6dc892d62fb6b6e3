"""Per-prompt statistics against the reference's numbers."""

import json

import numpy as np
import pytest

from ddpo_jax.advantages import PerPromptStatTracker, normalize


@pytest.mark.parametrize("dtype", ("float64", "float32"))
def test_advantages_equal_the_references(golden, dtype):
  stored = golden("b_stat_tracker")
  tracker = PerPromptStatTracker(int(stored["buffer_size"]), int(stored["min_count"]))
  for call in range(4):
    prompts = [str(p) for p in stored[f"call{call}_prompts"]]
    advantages = tracker.update(prompts, stored[f"call{call}_rewards_{dtype}"])
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, stored[f"call{call}_advantages_{dtype}"],
                               rtol=1e-4, atol=1e-5)
    stats = tracker.get_stats()
    for i, prompt in enumerate(stored[f"call{call}_stat_prompts"]):
      for name in ("mean", "std", "count"):
        expected = stored[f"call{call}_stat_{name}_{dtype}"][i]
        assert stats[str(prompt)][name] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_integer_rewards_are_not_truncated():
  """In the reference they make integer advantages: mostly 0."""
  advantages = PerPromptStatTracker(4, 4).update(["a", "b", "c"], np.array([1, 2, 4]))
  assert advantages.dtype == np.float32
  np.testing.assert_allclose(advantages, normalize(np.array([1, 2, 4])), rtol=1e-5)
  assert len(set(advantages)) == 3


def test_long_prompts_do_not_share_a_buffer():
  """The reference keys by what is left of a prompt after 77 tokens."""
  long = "a very " * 100
  tracker = PerPromptStatTracker(4, 1)
  tracker.update([long + "big cat", long + "small dog"], np.array([1.0, 9.0]))
  assert {stats["count"] for stats in tracker.get_stats().values()} == {1}


def test_state_survives_json():
  tracker, other = (PerPromptStatTracker(3, 2) for _ in range(2))
  rng = np.random.default_rng(0)
  prompts = ["a", "b", "a", "c"]
  for _ in range(3):
    tracker.update(prompts, rng.normal(size=4))
  other.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
  rewards = rng.normal(size=4)
  np.testing.assert_array_equal(tracker.update(prompts, rewards),
                                other.update(prompts, rewards))


@pytest.mark.parametrize("rewards", ([1.0, np.nan], [np.inf, 0.0], [[1.0], [2.0]]))
def test_bad_rewards_raise(rewards):
  for standardise in (normalize,
                      lambda r: PerPromptStatTracker(4, 2).update(["a", "b"], r)):
    with pytest.raises(ValueError, match="finite"):
      standardise(np.array(rewards))


def test_each_reward_has_a_prompt():
  """A single prompt's statistics would fit any number of rewards."""
  tracker = PerPromptStatTracker(4, 2)
  with pytest.raises(ValueError, match="1 prompts for 3 rewards"):
    tracker.update(["a"], np.arange(3.0))
  assert tracker.get_stats() == {}


def test_constant_rewards_have_no_advantage():
  np.testing.assert_array_equal(normalize(np.full(4, 3.0)), np.zeros(4))


def test_tiny_deviations_are_damped_as_by_the_references():
  """Rewards that differ by rounding alone must not become advantages of one."""
  rewards = np.array([1.0, 1.0 + 2e-6])
  np.testing.assert_allclose(normalize(rewards), [-1 / 1.01, 1 / 1.01], rtol=1e-4)
  tracked = PerPromptStatTracker(4, 2).update(["a", "a"], rewards)
  np.testing.assert_allclose(tracked, [-1 / 2, 1 / 2], rtol=1e-4)
