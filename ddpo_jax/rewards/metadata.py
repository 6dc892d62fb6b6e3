"""What a reward needs of the prompts' metadata, looked at before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, TypeVar

from ddpo_jax.types import RewardFn

F = TypeVar("F", bound=Callable)

_ATTRIBUTE = "check_metadata"


def checks_metadata(check: Callable[[list[dict[str, Any]]], Any]) -> Callable[[F], F]:
  """Decorates a reward function with a check that raises UserError, as the function would."""
  def decorate(function: F) -> F:
    function.__dict__[_ATTRIBUTE] = check
    return function
  return decorate


def check_metadata(function: RewardFn, metadata: list[dict[str, Any]]) -> None:
  """Makes the check that a reward function has, if it has one.

  Raises:
    UserError: if the function cannot score images with such metadata.
  """
  while isinstance(function, functools.partial):
    function = function.func
  check = getattr(function, _ATTRIBUTE, None)
  if check is not None:
    check(metadata)
