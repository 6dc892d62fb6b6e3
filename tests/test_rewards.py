"""JPEG rewards against the reference, colours on drawn pictures, several rewards at once,
and the check of what a reward returns.
"""

import asyncio
import dataclasses
import json
import sys
import threading
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import PIL
import pytest

from ddpo_jax import tiny_scenes
from ddpo_jax.errors import UserError
from ddpo_jax.models.vae import to_uint8
from ddpo_jax.rewards import (
  REWARD_FACTORIES,
  call_reward,
  check_rewards,
  get_reward,
  get_rewards,
)
from ddpo_jax.rewards.combined import RewardCombiner
from ddpo_jax.rewards.info import InfoCollector

PROMPTS = ["a cat", "a dog", "a cow"]
IMAGES = np.ones((3, 2, 2, 3), np.uint8)


def scaled(images, prompts, metadata, factor):
  return factor * np.arange(len(images)), {"factor": factor}


async def slow_brightness(images, prompts, metadata):
  means = await asyncio.gather(*(_mean(image) for image in images))
  return np.array(means), {}


async def _mean(image):
  await asyncio.sleep(0.001)
  return image.mean()


def writing(images, prompts, metadata):
  images[:] = 0
  prompts.clear()
  for each in metadata:
    each["seen"] = True
    each.get("deep", []).clear()
  return np.ones(len(images)), {}


def without_metadata(images, prompts):
  return np.zeros(len(images)), {}


def factor_third(images, prompts, factor):
  return factor * np.zeros(len(images)), {}


def annotated(images: "Nowhere", prompts, metadata, factor=1):  # noqa: F821
  return factor * np.zeros(len(images)), {}


def described(images, prompts, metadata, factor: Annotated[int, {"least": 0}] = 1):
  return factor * np.zeros(len(images)), {}


def named_otherwise(pictures, texts, info, factor=1, **rest):
  return factor * np.zeros(len(pictures)), rest


def by_name(*, images: np.ndarray, prompts, metadata=None):
  return np.zeros(len(images)), {}


def without_info(images, prompts, metadata):
  return np.zeros(len(images))


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


@pytest.mark.parametrize("function,kwargs,taken", [
    ("without_metadata", {}, "(images, prompts)"),
    ("factor_third", {"factor": 2}, "(images, prompts, factor)"),
    ("by_name", {}, "(*, images, prompts, metadata)")])
def test_what_a_reward_must_take_is_said(function, kwargs, taken):
  name = f"{__name__}:{function}"
  with pytest.raises(UserError) as error:
    get_reward(name, **kwargs)
  assert str(error.value) == (
      f"reward_fn={name!r} takes {taken}; must take (images, prompts, metadata) first")


def test_annotations_may_name_what_is_only_there_for_type_checkers():
  name = f"{__name__}:annotated"
  get_reward(name, factor=2)
  with pytest.raises(UserError, match="unexpected keyword argument 'power'; it takes: factor"):
    get_reward(name, power=2)


def test_annotations_may_be_of_a_type_that_cannot_be_looked_up():
  get_reward(f"{__name__}:described", factor=2)


def test_a_reward_may_name_what_it_takes_as_it_likes():
  get_reward(f"{__name__}:named_otherwise", factor=2, other=3)


@pytest.mark.parametrize("values,message", [
    ([1.0, np.nan, 2.0], "sample 1, prompt 'a dog'"),
    ([1.0, 2.0, -np.inf], "sample 2, prompt 'a cow'"),
    ([1.0, 2.0], r"shape \(2,\)"), ([[1.0], [2.0], [3.0]], r"shape \(3, 1\)"),
    (["a", "b", "c"], "must be numbers"), (None, "shape"),
    ([[1.0], [2.0, 3.0], 4.0], r"not an array.*must be \(3,\)"),
    ([1e39, 0.0, 0.0], "sample 0"), ([1.0, 10**400, 2.0], "inf for sample 1, prompt 'a dog'"),
    (np.ma.masked_array([1.0, 2.0, 999.0], [False, False, True]), "nan for sample 2"),
    ([1.0, None, 2.0], "returned None for sample 1, prompt 'a dog'; must be a number"),
])
def test_wrong_values_name_function_sample_and_prompt(values, message):
  with pytest.raises(UserError, match=message) as error:
    check_rewards("my:reward", values, PROMPTS)
  assert "my:reward" in str(error.value)


@pytest.mark.parametrize("values", ([1, 2, 3], [True, False, True], np.float64([1, 2, 3]),
                                    jnp.bfloat16([1, 2, 3]), np.array([1, 2.0, True], object)))
def test_any_numbers_become_float32(values):
  assert check_rewards("f", values, PROMPTS).dtype == np.float32


def test_async_rewards_are_awaited():
  images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
  name = f"{__name__}:slow_brightness"
  rewards, _ = call_reward(name, get_reward(name), images, PROMPTS, [{}] * 3)
  assert rewards.tolist() == [0, 1, 2]


async def exits_later(images, prompts, metadata):
  sys.exit(0)


async def exits_in_a_task(images, prompts, metadata):
  await asyncio.gather(*(exits_later(images, prompts, metadata) for _ in range(2)))


async def is_cancelled(images, prompts, metadata):
  raise asyncio.CancelledError


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
  code: int = 7


def raises_what_takes_no_note(images, prompts, metadata):
  raise FrozenError


def test_errors_stay_what_they_are():
  try:
    call_reward("mine:f", raises_what_takes_no_note, IMAGES, PROMPTS, [{}] * 3)
  except FrozenError as error:
    assert error.code == 7
  else:
    pytest.fail("raised nothing")
  with pytest.raises(RuntimeError, match="^reward_fn='mine:f' raised CancelledError"):
    call_reward("mine:f", is_cancelled, IMAGES, PROMPTS, [{}] * 3)


def test_what_metadata_have_in_common_is_copied_once():
  """A table or a model, say, that a prompt function gives to all of them."""
  common, seen = np.zeros(8), []

  def reward(images, prompts, metadata):
    seen.extend(each["common"] for each in metadata)
    return [1.0] * len(images), {}

  call_reward("mine:f", reward, IMAGES, PROMPTS, [{"common": common} for _ in PROMPTS])
  assert len(set(map(id, seen))) == 1 and seen[0] is not common


@pytest.mark.parametrize("reward", (lambda *_: sys.exit(0), exits_later, exits_in_a_task))
def test_a_reward_that_exits_is_an_error(reward):
  """Else the run would end with status 0."""
  with pytest.raises(RuntimeError, match="^reward_fn='mine:f' raised SystemExit\(0\)"):
    call_reward("mine:f", reward, IMAGES, PROMPTS, [{}] * 3)


def test_errors_of_rewards_say_whose_they_are():
  def fails(images, prompts, metadata):
    raise OSError("No space left on device")

  with pytest.raises(OSError) as error:
    call_reward("mine:f", fails, IMAGES, PROMPTS, [{}] * 3)
  assert error.value.__notes__ == ["raised by reward_fn='mine:f'"]


def test_what_a_reward_writes_into_its_arguments_reaches_nobody():
  images, prompts = np.ones((3, 2, 2, 3), np.uint8), list(PROMPTS)
  metadata = [{"deep": [1]}, {}, {"no copy": threading.Lock()}]
  rewards, _ = call_reward("writing", writing, images, prompts, metadata)
  assert rewards.tolist() == [1, 1, 1]
  assert images.all() and prompts == PROMPTS and metadata[:2] == [{"deep": [1]}, {}]


def test_of_what_cannot_be_copied_a_reward_gets_all():
  """Not the half of a copy that was made before it failed."""
  common, seen = {"a": 1, "no copy": threading.Lock()}, []

  def reward(images, prompts, metadata):
    seen.extend(each["common"] for each in metadata)
    return [1.0] * len(images), {}

  call_reward("mine:f", reward, IMAGES, PROMPTS, [{"common": common} for _ in PROMPTS])
  assert seen == [common] * 3


def test_a_reward_without_info_is_refused():
  name = f"{__name__}:without_info"
  with pytest.raises(UserError, match="without_info.*ndarray.*return rewards, {}"):
    call_reward(name, get_reward(name), np.zeros((3, 2, 2, 3), np.uint8), PROMPTS, [{}] * 3)


def test_unknown_reward_lists_all_there_are():
  with pytest.raises(UserError) as error:
    get_reward("nope")
  assert all(name in str(error.value) for name in ("color_alignment", *REWARD_FACTORIES))


# ---- what else to log ----


def collect(*infos, name="my:reward"):
  """Of an epoch of one process, whose batches have two samples each."""
  indices = np.arange(2 * len(infos)).reshape(-1, 2)
  return InfoCollector().collect([{name: info} for info in infos], indices, indices.size)


def test_numbers_and_texts_beside_the_rewards_are_logged():
  info = collect(
      {"mass": np.array([1, 2]), "all": 3, "right": [True, False], "answers": [["a"], ["b"]],
       "score": np.float64([np.nan, 1])},
      {"mass": [3.5, 1e300], "answers": (["c", "d"], []), "late": ["x", "y"]})
  assert info.means() == {
      "reward/my:reward/mass_mean": 6.5 / 3, "reward/my:reward/all_mean": 3.0,
      "reward/my:reward/right_mean": 0.5, "reward/my:reward/score_mean": 1.0}
  per_image = info.per_image()
  assert per_image == {"my:reward": {
      "mass": [1, 2, 3.5, None], "all": [3, 3, None, None], "right": [1, 0, None, None],
      "score": [None, 1, None, None], "answers": [["a"], ["b"], ["c", "d"], []],
      "late": [None, None, "x", "y"]}}
  json.loads(json.dumps(per_image, allow_nan=False))


class Hostile:
  def __array__(self, *args, **kwargs):
    raise RuntimeError("no array of mine")


@pytest.mark.parametrize("value", [
    [1.0], np.zeros((2, 1)), [[1], [2, 3]], ["a"], "ab", {"a": 1}, None, [None, 1.0],
    [2**70, 1], [1j, 2j], Hostile(), [Hostile(), Hostile()]])
def test_what_cannot_be_logged_is_said_once_and_left_out(value, capsys):
  info = collect({"bad": value, "good": [1, 2]}, {"bad": value, "good": [3, 4]})
  assert info.per_image() == {"my:reward": {"good": [1, 2, 3, 4]}}
  (line,) = capsys.readouterr().out.splitlines()
  assert "reward_fn='my:reward'" in line and "'bad'" in line and "2 numbers" in line


def test_names_that_are_no_texts_are_left_out(capsys):
  assert collect({3: [1, 2]}).means() == {}
  assert "under 3" in capsys.readouterr().out


# ---- color_alignment ----


def drawn(rng, texture):
  scene = tiny_scenes.random_scene(rng)
  scene = dataclasses.replace(scene, texture=texture)
  return tiny_scenes.draw(scene, rng)[None], scene


def alignment(images, color, background):
  metadata = [{"color": color, "background": background}] * len(images)
  return get_reward("color_alignment")(images, [""] * len(images), metadata)[0]


@pytest.mark.parametrize("texture,least,most", [  # noise reaches into other colours
    ("plain", 0.99, 0.2), ("striped", 0.85, 0.2), ("checkered", 0.85, 0.2), ("noisy", 0.45, 0.6)])
def test_color_alignment_knows_the_shapes_color(texture, least, most):
  rng = np.random.default_rng(0)
  for _ in range(60):
    image, scene = drawn(rng, texture)
    assert alignment(image, scene.color, scene.background) >= least, scene
    for other in set(tiny_scenes.COLORS) - {scene.color, scene.background}:
      assert alignment(image, other, scene.background) < most, (scene, other)


def test_color_alignment_falls_with_the_share_of_another_color():
  rng = np.random.default_rng(0)
  scores = []
  for mixed in (0, 8, 16, 24, 32):
    image = np.broadcast_to(np.uint8(tiny_scenes.COLORS["blue"]), (1, 64, 64, 3)).copy()
    image[:, 16:48, 16:48] = tiny_scenes.COLORS["red"]
    image[:, 16:16 + mixed, 16:48] = tiny_scenes.COLORS["yellow"]
    scores.append(float(alignment(image, "red", "blue")[0]))
  np.testing.assert_allclose(scores, [1, 0.75, 0.5, 0.25, 0], atol=0.01)
  noise = rng.integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
  assert alignment(noise, "red", "blue") < 0.3


def test_filling_the_picture_does_not_pay():
  full = np.broadcast_to(np.uint8(tiny_scenes.COLORS["red"]), (1, 64, 64, 3))
  empty = np.broadcast_to(np.uint8(tiny_scenes.COLORS["blue"]), (1, 64, 64, 3))
  assert alignment(full, "red", "blue") == 0
  assert alignment(empty, "red", "blue") == 0
  nearly = full.copy()
  nearly[:, :6] = tiny_scenes.COLORS["blue"]
  assert alignment(nearly, "red", "blue") < 0.35


def test_exchanged_colors_do_not_pay():
  """Nor do the shades of one background that another could have."""
  rng = np.random.default_rng(0)
  for texture in tiny_scenes.TEXTURES:
    for _ in range(30):
      image, scene = drawn(rng, texture)
      assert alignment(image, scene.background, scene.color) < 0.1, scene
      if texture == "noisy":  # whose dark parts may well be black
        continue
      for other in set(tiny_scenes.COLORS) - {scene.color, scene.background}:
        assert alignment(image, scene.color, other) < 0.2, (scene, other)


def test_color_alignment_needs_metadata():
  images = np.zeros((1, 64, 64, 3), np.uint8)
  with pytest.raises(UserError, match="tiny_shapes"):
    get_reward("color_alignment")(images, ["a cat"], [{}])
  with pytest.raises(UserError, match="a 'color' and another one"):
    get_reward("color_alignment")(images, ["red"], [{"color": "red", "background": "red"}])


# ---- several rewards ----


@pytest.mark.parametrize("value", ("x", 0))  # of another type; out of range
def test_arguments_of_several_rewards_are_called_as_they_are_set(value):
  with pytest.raises(UserError, match=r"^reward_kwargs\.aesthetic_score\.batch_size=.* must be"):
    get_rewards({"jpeg_compressibility": 1.0, "aesthetic_score": 2.0},
                {"aesthetic_score": {"batch_size": value}})


def test_several_rewards_are_standardised_then_weighted():
  rng = np.random.default_rng(0)
  large = rng.normal(500, 100, (3, 64))
  small = rng.normal(-2, 0.01, (3, 64))
  combiner = RewardCombiner({"large": 1.0, "small": -0.5})
  for epoch in range(3):
    total = combiner.combine({"large": large[epoch], "small": small[epoch]})
    standard = lambda x, so_far: (x - so_far.mean()) / so_far.std()
    expected = (standard(large[epoch], large[:epoch + 1])
                - 0.5 * standard(small[epoch], small[:epoch + 1]))
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
    restored = RewardCombiner({"large": 1.0, "small": -0.5})
    restored.load_state_dict(json.loads(json.dumps(combiner.state_dict())))
    combiner = restored


def test_a_constant_reward_adds_nothing():
  combiner = RewardCombiner({"constant": 1.0, "other": 1.0})
  total = combiner.combine({"constant": np.full(4, 3.0), "other": np.arange(4.0)})
  assert np.isfinite(total).all() and np.argsort(total).tolist() == [0, 1, 2, 3]


def test_arguments_of_several_rewards_go_by_name():
  name = f"{__name__}:scaled"
  functions = get_rewards({name: 1.0, "jpeg_compressibility": 0.2}, {name: {"factor": 3}})
  assert list(functions) == [name, "jpeg_compressibility"]
  assert functions[name](np.zeros((2, 2, 2, 3)), [], [])[0].tolist() == [0, 3]
  with pytest.raises(UserError, match="reward_kwargs.factor"):
    get_rewards({name: 1.0}, {"factor": 3})
