"""Checks, before anything is sampled, that the prompts' metadata has what a reward needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, TypeVar

from ddpo_jax.errors import UserError
from ddpo_jax.messages import shown
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
  """Runs the check that `checks_metadata` attached to a reward function, if there is one.

  Raises:
    UserError: if the function cannot score images with such metadata.
  """
  while isinstance(function, functools.partial):
    function = function.func
  check = getattr(function, _ATTRIBUTE, None)
  if check is not None:
    check(metadata)


def questions_and_answers(reward: str, metadata: Sequence[dict[str, Any]]
                          ) -> list[tuple[list[str], list[str]]]:
  """Each image's questions with their right answers, as the prompt function gave them.

  Raises:
    UserError: if an image has none, or not an answer to each question.
  """
  found = []
  for i, entry in enumerate(metadata):
    questions, answers = entry.get("questions", ()), entry.get("answers", ())
    if not (_are_texts(questions) and _are_texts(answers)
            and len(questions) == len(answers)):
      raise UserError(
          f"reward_fn={reward!r} got metadata {shown(entry)} for sample {i}; must have questions "
          "and as many answers, both lists of strings: use prompt_fn='counting', or your own "
          "that gives them (without questions: llava_bertscore, or vlm_score with "
          "mode='probability')")
    found.append(([str(q) for q in questions], [str(a) for a in answers]))
  return found


def _are_texts(value: Any) -> bool:
  return (isinstance(value, (list, tuple)) and len(value) > 0
          and all(isinstance(x, str) and x for x in value))
