"""Prompt functions: each draws a prompt, and metadata for the reward, from a generator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import functools
import importlib.resources
from importlib.resources.abc import Traversable
import os
import pathlib
from typing import Any

import numpy as np

from ddpo_jax import english, files, rng_streams, tiny_scenes
from ddpo_jax.errors import UserError
from ddpo_jax.messages import is_utf8, one_line, shown
from ddpo_jax.types import PromptFn
from ddpo_jax.user_functions import calling, check_kwargs, resolve_function

_ASSETS = importlib.resources.files("ddpo_jax") / "assets"


def get_prompt_fn(name: str, **kwargs: Any) -> PromptFn:
  """Finds a prompt function and binds its keyword arguments.

  Args:
    name: of a function here, or "package.module:function" for a user's own. Either is
      called as `function(rng, **kwargs)`.

  Raises:
    UserError: if there is no such function, or it does not take `kwargs`.
  """
  function = resolve_function("prompt_fn", name, PROMPT_FUNCTIONS)
  check_kwargs("prompt_fn", name, function, ("rng",), kwargs, "prompt_fn_kwargs")
  return functools.partial(function, **kwargs)


def draw_prompts(prompt_fn: PromptFn, seed: int, epoch: int, indices: Iterable[int]
                 ) -> tuple[list[str], list[dict[str, Any]]]:
  """The prompts of an epoch's samples: a pure function of (seed, epoch, sample index).

  Raises:
    UserError: if the function does not return a prompt and a dict.
  """
  of = "the evaluation" if epoch == rng_streams.EVALUATION else f"epoch {epoch}"

  def draw(index: int) -> tuple[str, dict[str, Any]]:
    what = f"prompt_fn, for sample {index} of {of},"
    with calling(what):
      drawn = prompt_fn(sample_rng(seed, epoch, index))
    return check_drawn(drawn, what)

  drawn = [draw(index) for index in indices]
  return [prompt for prompt, _ in drawn], [metadata for _, metadata in drawn]


def check_drawn(drawn: Any, source: str) -> tuple[str, dict[str, Any]]:
  """What a prompt function returned, if it is what it must be.

  Args:
    drawn: that.
    source: the function, for the message.

  Raises:
    UserError: if it is not a pair of a text and a dict.
  """
  is_pair = isinstance(drawn, (tuple, list)) and len(drawn) == 2
  if not is_pair or not isinstance(drawn[0], str) or not isinstance(drawn[1], Mapping):
    returned = " and a ".join(type(x).__name__ for x in (drawn if is_pair else [drawn]))
    raise UserError(f"{source} returned a {returned}; must return a prompt (str) and a dict")
  if not is_utf8(drawn[0]):
    raise UserError(f"{source} returned {shown(drawn[0])}; must be text that UTF-8 can encode")
  return drawn[0], dict(drawn[1])


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
  """What a sample's prompt is drawn from."""
  return np.random.default_rng([seed, epoch, int(index)])


def from_file(rng: np.random.Generator, path: str, low: int | None = None,
              high: int | None = None) -> tuple[str, dict[str, Any]]:
  """A line of a text file: one of lines `low` (included) to `high` (not), or of all.

  Lines count from 0, without the blank ones.

  The path is of a local file, or of one of the lists in this package.
  """
  return _choose(rng, _some_lines(path, low, high)), {}


@functools.cache
def _some_lines(path: str, low: int | None, high: int | None) -> list[str]:
  lines = load_lines(path, "prompt_fn_kwargs.path")
  for name, bound in (("low", low), ("high", high)):
    if bound is not None and not 0 <= bound <= len(lines):
      raise UserError(f"prompt_fn_kwargs.{name}={bound} must be in 0..{len(lines)}: {path!r} has "
                      f"{len(lines)} lines")
  chosen = lines[low:high]
  if not chosen:
    raise UserError(f"prompt_fn_kwargs.low={low} and high={high} leave no line of {path!r}; "
                    f"must leave some of lines 0 to {len(lines) - 1}")
  return chosen


def _choose(rng: np.random.Generator, lines: Sequence[str]) -> str:
  return lines[int(rng.integers(len(lines)))]


def imagenet_all(rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
  """A class name of ImageNet."""
  return from_file(rng, "imagenet_classes.txt")


def imagenet_animals(rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
  """One of ImageNet's 398 kinds of animal."""
  return from_file(rng, "imagenet_classes.txt", 0, 398)


def imagenet_dogs(rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
  """One of ImageNet's 118 breeds of dog."""
  return from_file(rng, "imagenet_classes.txt", 151, 269)


def simple_animals(rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
  """One of some fifty common animals."""
  return from_file(rng, "simple_animals.txt")


def nouns_activities(rng: np.random.Generator, nouns_file: str, activities_file: str
                     ) -> tuple[str, dict[str, Any]]:
  """Such as "a cat washing dishes", from two lists."""
  noun = _choose(rng, load_lines(nouns_file, "prompt_fn_kwargs.nouns_file"))
  activity = _choose(rng, load_lines(activities_file, "prompt_fn_kwargs.activities_file"))
  return f"{english.with_article(noun)} {activity}", {}


def counting(rng: np.random.Generator, nouns_file: str, low: int, high: int
             ) -> tuple[str, dict[str, Any]]:
  """Such as "three cats": `low` to `high` (included), with questions and answers."""
  if not 0 <= low <= high:
    raise UserError(f"prompt_fn_kwargs.low={low} must be at least 0, and at most high={high}")
  number = english.number(int(rng.integers(low, high + 1)))
  noun = _choose(rng, load_lines(nouns_file, "prompt_fn_kwargs.nouns_file"))
  plural = english.plural(noun)
  return f"{number} {plural}", {
      "questions": [f"How many {plural} are there in this image?",
                    "What animal is in this image?"],
      "answers": [number, noun]}


def tiny_shapes(rng: np.random.Generator, max_count: int = len(tiny_scenes.COUNTS),
                pool: int = 0, short: bool = False
                ) -> tuple[str, dict[str, Any]]:
  """What the embedded model understands, such as "two red circles on a blue background".

  Shows up to `max_count` shapes, 1 to 4. With `pool` there are only so many different
  prompts, always the same ones, so that each comes up often. `short` prompts,
  "two red circles on a blue", lack a word that the model has not learnt to do without: it
  guesses the background's colour.
  """
  if not 1 <= max_count <= len(tiny_scenes.COUNTS):
    raise UserError(f"prompt_fn_kwargs.max_count={max_count} must be in "
                    f"1..{len(tiny_scenes.COUNTS)}")
  if pool < 0:
    raise UserError(f"prompt_fn_kwargs.pool={pool} must be at least 0; 0 means no pool")
  if pool:
    rng = np.random.default_rng(int(rng.integers(pool)))
  return tiny_scenes.random_prompt(rng, max_count, short)


PROMPT_FUNCTIONS = {f.__name__: f for f in (
    from_file, imagenet_all, imagenet_animals, imagenet_dogs, simple_animals,
    nouns_activities, counting, tiny_shapes)}
_FILES = ("path", "nouns_file", "activities_file")  # their arguments that may name a local file


def absolute_paths(prompt_fn: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments with the local files that a function of this module is given as absolute paths.

  A user's own function has its arguments as they are.
  """
  return {name: files.absolute(value) if _is_local_file(prompt_fn, name, value) else value
          for name, value in kwargs.items()}


def is_moved(prompt_fn: str, name: str, value: Any, before: Any) -> bool:
  """Whether an argument is a file that can be one that was elsewhere before."""
  return (_is_local_file(prompt_fn, name, value) and isinstance(before, str)
          and os.path.isabs(before) and not os.path.isfile(before))


def _is_local_file(prompt_fn: str, name: str, value: Any) -> bool:
  return (prompt_fn in PROMPT_FUNCTIONS and name in _FILES and isinstance(value, str)
          and os.path.isfile(os.path.expanduser(value)))


@functools.cache
def load_lines(path: str, field: str = "") -> list[str]:
  """The lines of a local file, or of one in this package, without the blank ones.

  Args:
    path: of the file; without a `field` it may be a pipe, as a shell makes of <(command).
    field: of the config that has the path. Resuming reads it again.

  Raises:
    UserError: if there are none.
  """
  named = f"{field}={path!r}" if field else f"prompt file {path!r}"
  must_be = "must be a text file with a prompt on each line"
  file: pathlib.Path | Traversable = files.expand_home(path)
  is_there, is_folder = os.path.exists(str(file)), os.path.isdir(str(file))
  if is_folder or not (is_there if field == "" else os.path.isfile(str(file))):
    asset = next((f for f in _ASSETS.iterdir() if f.name == path and f.is_file()), None)
    if asset is None:
      problem = ("is a folder" if is_folder else
                 "is a pipe or a device" if is_there else "does not exist")
      raise UserError(f"{named} {problem}; {must_be}")
    file = asset
  try:
    # Not splitlines, which also ends a line at characters that may be within a prompt.
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{named} cannot be read as text: {one_line(error)}; {must_be}") from error
  lines = [line for line in lines if line]
  if not lines:
    raise UserError(f"{named} is empty; {must_be}")
  return lines
