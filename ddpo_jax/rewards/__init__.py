"""Reward functions: `reward_fn(images, prompts, metadata) -> (rewards, info)`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
import copy
import functools
import inspect
import math
import numbers
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float32, UInt8
import numpy as np

from ddpo_jax.errors import UserError, renamed
from ddpo_jax.messages import one_line, shown
from ddpo_jax.redaction import redacted
from ddpo_jax.rewards.color import color_alignment
from ddpo_jax.rewards.info import unmasked
from ddpo_jax.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from ddpo_jax.types import RewardFn
from ddpo_jax.user_functions import calling, check_kwargs, resolve_function

REWARD_FUNCTIONS = {f.__name__: f for f in (jpeg_compressibility, jpeg_incompressibility,
                                            color_alignment)}
# These hold a network or speak to a server, so each is made once: by a factory that takes
# the keyword arguments and fails at once where something is not there.
REWARD_FACTORIES = {
    "aesthetic_score": "ddpo_jax.rewards.clip:make_aesthetic_score",
    "clip_score": "ddpo_jax.rewards.clip:make_clip_score",
    "pick_score": "ddpo_jax.rewards.clip:make_pick_score",
    "llava_strict_satisfaction": "ddpo_jax.rewards.llava:make_llava_strict_satisfaction",
    "llava_bertscore": "ddpo_jax.rewards.llava:make_llava_bertscore",
    "vlm_score": "ddpo_jax.rewards.vlm:make_vlm_score",
}
# Those of them whose network is on the device, in the `dtype` that they are given.
ON_DEVICE = ("aesthetic_score", "clip_score", "pick_score")


def get_reward(name: str, **kwargs: Any) -> RewardFn:
  """Finds a reward function and binds its keyword arguments.

  Args:
    name: of a function here, or "package.module:function" for a user's own. A user's is
      called as `function(images, prompts, metadata, **kwargs)` with images uint8
      [B, H, W, 3], and returns float rewards [B] and a dict of what else to log (see
      `info.InfoCollector`); it may be async.

  Raises:
    UserError: if there is no such function, or it does not take `kwargs`, or a model or
      server that it needs is not there.
  """
  return _bind(name, kwargs, "reward_kwargs")


def _bind(name: str, kwargs: Mapping[str, Any], field: str) -> RewardFn:
  """`get_reward`, whose keyword arguments are in `field` of the config."""
  if name in REWARD_FACTORIES:
    factory = resolve_function("reward_fn", REWARD_FACTORIES[name], {})
    check_kwargs("reward_fn", name, factory, (), dict(kwargs), field)
    with renamed("reward_kwargs.", f"{field}."):
      return factory(**kwargs)
  function = resolve_function("reward_fn", name, REWARD_FUNCTIONS, list(REWARD_FACTORIES))
  check_kwargs("reward_fn", name, function, ("images", "prompts", "metadata"), dict(kwargs), field)
  return functools.partial(function, **kwargs)


def get_rewards(spec: str | Mapping[str, float], kwargs: Mapping[str, Any]
                ) -> dict[str, RewardFn]:
  """The functions of `config.reward_fn`: one, or several with weights.

  Args:
    spec: a name, or names and their weights.
    kwargs: keyword arguments; with several functions, those of each under its name.

  Raises:
    UserError: as `get_reward`, and for arguments of a function that is not in `spec`.
  """
  if not isinstance(spec, str):
    for name, value in kwargs.items():
      if name not in spec or not isinstance(value, Mapping):
        raise UserError(f"reward_kwargs.{name}={redacted({name: value})[name]!r}: with several "
                        "rewards, must be the arguments of one of them, by its name: "
                        f"{', '.join(spec)}")
  several = not isinstance(spec, str)
  return {name: _bind(name, own, f"reward_kwargs.{name}" if several else "reward_kwargs")
          for name, own in kwargs_by_reward(spec, kwargs).items()}


def kwargs_by_reward(spec: str | Mapping[str, float], kwargs: Mapping[str, Any]
                     ) -> dict[str, Mapping[str, Any]]:
  """Each function's own keyword arguments; with a single function they are not under its name."""
  if isinstance(spec, str):
    return {spec: kwargs}
  return {name: kwargs.get(name, {}) for name in spec}


def call_reward(name: str, function: RewardFn, images: UInt8[np.ndarray, "B H W 3"],
                prompts: list[str], metadata: list[dict[str, Any]]
                ) -> tuple[Float32[np.ndarray, " B"], dict[str, Any]]:
  """Calls a reward function, awaits it if it is async, and checks what it returns.

  It gets copies, so that what it writes into them reaches neither the images that are logged
  nor other rewards.

  Raises:
    UserError: if it is not a pair of rewards, one finite number for each image, and a
      dict; names the function.
  """
  with calling(f"reward_fn={name!r}"):
    result = function(images.copy(), list(prompts), _copy(metadata))
    if inspect.isawaitable(result):
      result = asyncio.run(_wait_for(result))
  if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
    raise UserError(f"reward_fn={name!r} returned {_kind(result)}; must be a pair of "
                    "rewards and a dict: return rewards, {}")
  return check_rewards(name, result[0], prompts), result[1]


def _copy(metadata: list[dict[str, Any]]) -> list[dict[str, Any]]:
  copied: dict[int, Any] = {}  # what samples have in common is copied once

  def copy_one(entry: dict[str, Any]) -> dict[str, Any]:
    try:
      return copy.deepcopy(entry, copied)
    except Exception:  # it holds what cannot be copied
      copied.clear()  # there may be half of a copy in it
      return copy.copy(entry)

  return list(map(copy_one, metadata))


async def _wait_for(result: Awaitable[Any]) -> Any:
  return await result


def _kind(result: Any) -> str:
  if isinstance(result, tuple):
    return f"a tuple of {', '.join(type(x).__name__ for x in result)}"
  return f"a {type(result).__name__}"


def check_rewards(name: str, rewards: Any, prompts: list[str]
                  ) -> Float32[np.ndarray, " B"]:
  """What a reward function returned, as numbers of one type.

  Raises:
    UserError: if it is not one finite number for each image; names the function, the
      sample and its prompt.
  """
  try:
    array = unmasked(rewards)
  except Exception as error:  # rows of different lengths, an array of another library's
    raise UserError(f"reward_fn={name!r} returned rewards that are not an array "
                    f"({one_line(error)}); must be ({len(prompts)},), one number for each image, "
                    "such as a list or an array of NumPy's") from error
  if array.shape != (len(prompts),):
    raise UserError(f"reward_fn={name!r} returned rewards of shape {array.shape}; must be "
                    f"({len(prompts)},), one for each image")
  if array.dtype == object:
    array = np.array([_number(name, i, item, prompts) for i, item in enumerate(array)])
  if not (jnp.issubdtype(array.dtype, jnp.floating) or  # bfloat16 is one to JAX alone
          np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
    raise UserError(f"reward_fn={name!r} returned rewards of type {array.dtype}; must be "
                    "numbers")
  with np.errstate(over="ignore"):  # found below
    array = array.astype(np.float32)
  for i in np.flatnonzero(~np.isfinite(array)):
    raise UserError(f"reward_fn={name!r} returned {array[i]} for sample {i}, prompt "
                    f"{shown(prompts[i])}; must be finite, in float32")
  return array


def _number(name: str, i: int, item: Any, prompts: list[str]) -> float:
  """Sample `i`'s reward, of an array whose items are of different types."""
  if not isinstance(item, numbers.Real):
    raise UserError(f"reward_fn={name!r} returned {shown(item)} for sample {i}, prompt "
                    f"{shown(prompts[i])}; must be a number")
  try:
    return float(item)
  except OverflowError:
    return math.inf
