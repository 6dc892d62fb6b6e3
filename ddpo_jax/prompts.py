"""Prompt functions: each draws a prompt, and metadata for the reward, from a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import functools
import importlib
import importlib.resources
from importlib.resources.abc import Traversable
import inspect
import pathlib
from typing import Any

import numpy as np

from ddpo_jax import tiny_scenes, words
from ddpo_jax.config import masked, shown
from ddpo_jax.types import PromptFn, UserError

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
  check_kwargs("prompt_fn", name, function, ("rng",), kwargs)
  return functools.partial(function, **kwargs)


def draw_prompts(prompt_fn: PromptFn, seed: int, epoch: int, indices: Iterable[int]
                 ) -> tuple[list[str], list[dict[str, Any]]]:
  """The prompts of an epoch's samples: a pure function of (seed, epoch, sample index)."""
  drawn = [prompt_fn(np.random.default_rng([seed, epoch, int(i)])) for i in indices]
  return [prompt for prompt, _ in drawn], [metadata for _, metadata in drawn]


def from_file(rng: np.random.Generator, path: str, low: int | None = None,
              high: int | None = None) -> tuple[str, dict[str, Any]]:
  """A line of a text file: lines `low` (included) to `high` (not), blank ones dropped.

  The path is of a local file, or of one of the lists in this package.
  """
  lines = load_lines(path)[low:high]
  if not lines:
    raise UserError(f"prompt file {path!r} has no lines {low}..{high}; it has "
                    f"{len(load_lines(path))}")
  return lines[rng.integers(len(lines))], {}


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
  noun, _ = from_file(rng, nouns_file)
  activity, _ = from_file(rng, activities_file)
  return f"{words.with_article(noun)} {activity}", {}


def counting(rng: np.random.Generator, nouns_file: str, low: int, high: int
             ) -> tuple[str, dict[str, Any]]:
  """Such as "three cats": `low` to `high` (included), with questions and answers."""
  number = words.number(int(rng.integers(low, high + 1)))
  noun, _ = from_file(rng, nouns_file)
  plural = words.plural(noun)
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
  if pool:
    rng = np.random.default_rng(int(rng.integers(pool)))
  return tiny_scenes.random_prompt(rng, max_count, short)


PROMPT_FUNCTIONS = {f.__name__: f for f in (
    from_file, imagenet_all, imagenet_animals, imagenet_dogs, simple_animals,
    nouns_activities, counting, tiny_shapes)}


@functools.cache
def load_lines(path: str) -> list[str]:
  """The lines of a local file, or of one in this package, without the blank ones."""
  file: pathlib.Path | Traversable = pathlib.Path(path).expanduser()
  if not file.is_file():
    asset = _ASSETS / path
    if pathlib.PurePath(path).name != path or not asset.is_file():
      raise UserError(f"prompt file {path!r} does not exist; must be a text file with a "
                      "prompt on each line")
    file = asset
  try:
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"prompt file {path!r} cannot be read as text: {error}") from error
  lines = [line for line in lines if line]
  if not lines:
    raise UserError(f"prompt file {path!r} is empty; must have a prompt on each line")
  return lines


def resolve_function(field: str, name: str, known: dict[str, Callable],
                     also: Sequence[str] = ()) -> Callable:
  """A function by its name here, or imported from "package.module:function".

  `also` are names that the caller knows besides; for the message.
  """
  if name in known:
    return known[name]
  module_name, colon, function_name = name.partition(":")
  if not colon:
    raise UserError(f"{field}={name!r} is not known; must be one of "
                    f"{', '.join([*known, *also])}, "
                    "or your own as 'package.module:function'")
  try:
    function = getattr(importlib.import_module(module_name), function_name)
  except (ImportError, AttributeError, ValueError) as error:
    raise UserError(f"{field}={name!r} cannot be imported: {error}") from error
  if not callable(function):
    raise UserError(f"{field}={name!r} is a {type(function).__name__}; must be a function")
  return function


def check_kwargs(field: str, name: str, function: Callable, positional: Sequence[str],
                 kwargs: dict[str, Any]) -> None:
  """Refuses keyword arguments that the function does not take, or lacks."""
  try:
    inspect.signature(function).bind(*positional, **kwargs)
  except TypeError as error:
    arguments = "reward_kwargs" if field == "reward_fn" else f"{field}_kwargs"
    raise UserError(f"{field}={name!r} with {arguments}={shown(masked(kwargs))}: {error}"
                    ) from None
