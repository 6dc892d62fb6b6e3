"""JPEG rewards against the reference, and the check of what a reward returns."""

import numpy as np
import PIL
import pytest

from ddpo_jax.models.vae import to_uint8
from ddpo_jax.rewards import check_rewards, get_reward
from ddpo_jax.types import UserError

PROMPTS = ["a cat", "a dog", "a cow"]


def scaled(images, prompts, metadata, factor):
  return factor * np.arange(len(images)), {"factor": factor}


@pytest.fixture(scope="module")
def jpeg(golden):
  return golden("c_jpeg")


@pytest.mark.skipif(PIL.__version__ != "13.0.0",
                    reason="sizes depend on the JPEG encoder in this Pillow")
@pytest.mark.parametrize("size", (64, 256))
def test_jpeg_sizes_are_the_references(jpeg, size):
  images = jpeg[f"images_u8_{size}"]
  prompts = ["x"] * len(images)
  for name in ("compressibility", "incompressibility"):
    rewards, info = get_reward(f"jpeg_{name}")(images, prompts, [{}] * len(images))
    np.testing.assert_array_equal(rewards,
                                  jpeg[f"{name}_u8_{size}"].astype(np.float32))
    assert rewards.dtype == np.float32 and info == {}


def test_images_are_quantised_as_the_reference_does(jpeg):
  """Exact halves round to even; values out of range are clipped."""
  images = np.moveaxis(jpeg["images_f32_64"], 1, -1) * 2 - 1
  ours = np.moveaxis(np.asarray(to_uint8(images)), -1, 1)
  reference = jpeg["quantised_u8_64_nchw"]
  # Going through [-1, 1] moves a value by float32's last place: exact halves may turn.
  halves = np.abs(jpeg["images_f32_64"] * 255 % 1 - 0.5) < 1e-4
  np.testing.assert_array_equal(ours[~halves], reference[~halves])
  assert np.abs(ours.astype(int) - reference).max() <= 1
  assert np.asarray(to_uint8(np.float32([-1.4, 1.6, 1.0, -1.0]))).tolist() == [0, 255, 255, 0]


def test_users_own_with_arguments():
  rewards, info = get_reward(f"{__name__}:scaled", factor=2)(np.zeros((3, 2, 2, 3)), [], [])
  assert list(rewards) == [0, 2, 4] and info == {"factor": 2}


@pytest.mark.parametrize("name,kwargs", [
    ("nope", {}), (f"{__name__}:scaled", {}), (f"{__name__}:PROMPTS", {}),
    ("jpeg_compressibility", {"quality": 3}), ("os:no_such", {})])
def test_unusable_rewards_are_refused(name, kwargs):
  with pytest.raises(UserError, match="reward_fn"):
    get_reward(name, **kwargs)


@pytest.mark.parametrize("values,message", [
    ([1.0, np.nan, 2.0], "sample 1, prompt 'a dog'"),
    ([1.0, 2.0, -np.inf], "sample 2, prompt 'a cow'"),
    ([1.0, 2.0], r"shape \(2,\)"), ([[1.0], [2.0], [3.0]], r"shape \(3, 1\)"),
    (["a", "b", "c"], "must be numbers"), (None, "shape"),
    ([1e39, 0.0, 0.0], "sample 0"),
])
def test_wrong_values_name_function_sample_and_prompt(values, message):
  with np.errstate(over="ignore"), pytest.raises(UserError, match=message) as error:
    check_rewards("my:reward", values, PROMPTS)
  assert "my:reward" in str(error.value)


@pytest.mark.parametrize("values", ([1, 2, 3], [True, False, True], np.float64([1, 2, 3])))
def test_any_numbers_become_float32(values):
  assert check_rewards("f", values, PROMPTS).dtype == np.float32
