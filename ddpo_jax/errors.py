"""The errors that end a run as users see it. Imports nothing of ours: all of it may raise them."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import re

USAGE_ERROR = 2  # exit status
_NAMES_A_FIELD = re.compile(r"(--)?[\w.]+[=:]")


class UserError(Exception):
  """An input that the user can correct.

  The message has a line for each problem, which names the field, the value and what would be
  right. Scripts print it on standard error and exit with `USAGE_ERROR`.
  """


class DivergedError(UserError, FloatingPointError):
  """Training does not get finite numbers any more."""


class Interrupted(Exception):
  """A signal asked the program to stop. Code that lets this pass has saved its work first."""

  def __init__(self, signum: int):
    super().__init__(f"stopped by signal {signum}")
    self.signum = signum


@contextlib.contextmanager
def said_of(field: str, value: object) -> Iterator[None]:
  """Puts the field that the user has set, and its value, before UserErrors that name no field."""
  try:
    yield
  except UserError as error:
    raise type(error)("\n".join(
        line if _NAMES_A_FIELD.match(line) else f"{field}={value!r}: {line}"
        for line in str(error).splitlines())) from error


@contextlib.contextmanager
def renamed(field: str, given: str) -> Iterator[None]:
  """Has UserErrors call a field as the user has given it."""
  try:
    yield
  except UserError as error:
    raise type(error)(str(error).replace(field, given)) from error
