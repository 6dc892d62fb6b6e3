"""English articles, plurals and numbers in words."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def _engine() -> Any:
  import inflect  # takes seconds, which most runs need not spend
  return inflect.engine()


def with_article(noun: str) -> str:
  """"owl" -> "an owl"."""
  return str(_engine().a(noun))


def plural(noun: str) -> str:
  """"mouse" -> "mice"."""
  return str(_engine().plural(noun))


def number(value: int | str) -> str:
  """3 -> "three"; digits as a string do as well."""
  return str(_engine().number_to_words(value))
