"""Checks of what users give to rewards as `reward_kwargs`."""

from __future__ import annotations

from typing import Any

from ddpo_jax.errors import UserError


def check_count(name: str, value: Any) -> None:
  """Refuses what is not a positive integer.

  Raises:
    UserError: naming `reward_kwargs.{name}`.
  """
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise UserError(f"reward_kwargs.{name}={value!r} must be an integer, 1 or more")
