"""Reward functions: `reward_fn(images, prompts, metadata) -> (rewards, info)`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ddpo_jax.prompts import check_kwargs, resolve_function
from ddpo_jax.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from ddpo_jax.types import RewardFn, UserError

REWARD_FUNCTIONS = {f.__name__: f for f in (jpeg_compressibility, jpeg_incompressibility)}


def get_reward(name: str, **kwargs: Any) -> RewardFn:
  """Finds a reward function and binds its keyword arguments.

  Args:
    name: of a function here, or "package.module:function" for a user's own. Either is
      called as `function(images, prompts, metadata, **kwargs)` with images uint8
      [B, H, W, 3], and returns float rewards [B] and a dict.

  Raises:
    UserError: if there is no such function, or it does not take `kwargs`.
  """
  function = resolve_function("reward_fn", name, REWARD_FUNCTIONS)
  check_kwargs("reward_fn", name, function, ("images", "prompts", "metadata"), kwargs)
  return functools.partial(function, **kwargs)


def check_rewards(name: str, rewards: Any, prompts: list[str]) -> np.ndarray:
  """What a reward function returned, as float32 [B].

  Raises:
    UserError: if it is not one finite number for each image; names the function, the
      sample and its prompt.
  """
  array = np.asarray(rewards)
  if array.shape != (len(prompts),):
    raise UserError(f"reward_fn={name!r} returned rewards of shape {array.shape}; must be "
                    f"({len(prompts)},), one for each image")
  if not (np.issubdtype(array.dtype, np.floating) or
          np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
    raise UserError(f"reward_fn={name!r} returned rewards of type {array.dtype}; must be "
                    "numbers")
  array = array.astype(np.float32)
  for i in np.flatnonzero(~np.isfinite(array)):
    raise UserError(f"reward_fn={name!r} returned {array[i]} for sample {i}, prompt "
                    f"{prompts[i]!r}; must be finite")
  return array
