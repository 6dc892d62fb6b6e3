"""The errors that end a run as users see it. Imports nothing, so that anything can raise them."""

from __future__ import annotations

USAGE_ERROR = 2  # exit status


class UserError(Exception):
  """An input that the user can correct.

  The message has a line for each problem, which names the field, the value and what would be
  right. Scripts print it on standard error and exit with `USAGE_ERROR`.
  """


class Interrupted(Exception):
  """A signal asked the program to stop. Code that lets this pass has saved its work first."""

  def __init__(self, signum: int):
    super().__init__(f"stopped by signal {signum}")
    self.signum = signum
