"""Prompt functions: what they draw, that it repeats, and what they refuse."""

import numpy as np
import pytest

from ddpo_jax.prompts import PROMPT_FUNCTIONS, draw_prompts, get_prompt_fn, load_lines
from ddpo_jax.types import UserError


def two_words(rng, words=("red", "blue")):
  return f"{rng.choice(words)} {rng.integers(100)}", {"n": 1}


@pytest.mark.parametrize("name,count,first,last", [
    # Two classes are called "crane": the bird and the machine.
    ("imagenet_all", 999, "tench, Tinca tinca", None),
    ("imagenet_animals", 398, "tench, Tinca tinca", None),
    ("imagenet_dogs", 118, "Chihuahua", "Mexican hairless"),
    ("simple_animals", None, "ant", "zebra"),
])
def test_lists(name, count, first, last):
  prompts, metadata = draw_prompts(get_prompt_fn(name), 0, 0, range(3 * (count or 50)))
  lines = load_lines("imagenet_classes.txt" if "imagenet" in name else f"{name}.txt")
  assert set(prompts) <= set(lines) and set(map(str, metadata)) == {"{}"}
  everything = draw_prompts(get_prompt_fn(name), 1, 0, range(12_000))[0]
  seen = set(everything)
  assert len(seen) == (count or len(lines))
  assert first in seen
  if last:
    assert any(prompt.startswith(last) for prompt in seen)


def test_prompts_are_a_function_of_seed_epoch_and_index():
  function = get_prompt_fn("tiny_shapes")
  whole = draw_prompts(function, 3, 5, range(16))[0]
  parts = draw_prompts(function, 3, 5, range(8, 16))[0]
  assert whole[8:] == parts
  assert draw_prompts(function, 3, 6, range(16))[0] != whole
  assert draw_prompts(function, 4, 5, range(16))[0] != whole


def test_file_by_path(tmp_path):
  """The reference crashes on any file that is not its own."""
  path = tmp_path / "prompts.txt"
  path.write_text("a cat\n\n  a dog \na cow\n")
  function = get_prompt_fn("from_file", path=str(path), low=1)
  assert set(draw_prompts(function, 0, 0, range(20))[0]) == {"a dog", "a cow"}


@pytest.mark.parametrize("content", ("", "\n \n"))
def test_empty_file_is_refused(tmp_path, content):
  path = tmp_path / "prompts.txt"
  path.write_text(content)
  with pytest.raises(UserError, match="is empty"):
    get_prompt_fn("from_file", path=str(path))(np.random.default_rng(0))


def test_missing_unreadable_and_out_of_range_files(tmp_path):
  rng = np.random.default_rng(0)
  binary = tmp_path / "image.jpg"
  binary.write_bytes(b"\xff\xd8\xff\xe0")
  for kwargs, message in (({"path": "no_such.txt"}, "does not exist"),
                          ({"path": "../assets/simple_animals.txt"}, "does not exist"),
                          ({"path": str(binary)}, "cannot be read as text"),
                          ({"path": "simple_animals.txt", "low": 900}, "has no lines")):
    with pytest.raises(UserError, match=message):
      get_prompt_fn("from_file", **kwargs)(rng)


def test_short_prompts_ask_for_the_same():
  for seed in range(20):
    usual, data = get_prompt_fn("tiny_shapes")(np.random.default_rng(seed))
    short, same = get_prompt_fn("tiny_shapes", short=True)(np.random.default_rng(seed))
    assert data == same and usual == f"{short} background"
    assert short.endswith(data["background"])


def test_counting_and_activities(tmp_path):
  nouns, activities = tmp_path / "nouns.txt", tmp_path / "activities.txt"
  nouns.write_text("otter\n")
  activities.write_text("riding a bike\n")
  rng = np.random.default_rng(0)
  prompt, _ = get_prompt_fn("nouns_activities", nouns_file=str(nouns),
                            activities_file=str(activities))(rng)
  assert prompt == "an otter riding a bike"
  prompt, metadata = get_prompt_fn("counting", nouns_file=str(nouns), low=2, high=2)(rng)
  assert prompt == "two otters"
  assert metadata["answers"] == ["two", "otter"] and len(metadata["questions"]) == 2


def test_users_own():
  prompt, metadata = get_prompt_fn(f"{__name__}:two_words", words=("green",))(
      np.random.default_rng(0))
  assert prompt.startswith("green ") and metadata == {"n": 1}


@pytest.mark.parametrize("name,kwargs", [
    ("nope", {}), ("no_such_module:f", {}), (f"{__name__}:nope", {}),
    ("from_file", {}), ("tiny_shapes", {"path": "x"}), (":f", {}),
])
def test_what_cannot_be_called_is_refused(name, kwargs):
  with pytest.raises(UserError, match="prompt_fn"):
    get_prompt_fn(name, **kwargs)


def test_every_function_has_a_docstring():
  assert all(function.__doc__ for function in PROMPT_FUNCTIONS.values())


def test_pool_of_tiny_shapes():
  function = get_prompt_fn("tiny_shapes", max_count=1, pool=4)
  prompts = draw_prompts(function, 0, 0, range(60))[0]
  assert 1 < len(set(prompts)) <= 4
  assert set(draw_prompts(function, 9, 3, range(60))[0]) == set(prompts)
  assert all(prompt.startswith(("a ", "an ")) for prompt in prompts)
  with pytest.raises(UserError, match="max_count=5"):
    get_prompt_fn("tiny_shapes", max_count=5)(np.random.default_rng(0))
